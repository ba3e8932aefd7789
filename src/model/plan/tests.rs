#![allow(clippy::unwrap_used, clippy::float_cmp, clippy::indexing_slicing)]

use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::model::{
    curve::whole,
    forecast::{Bounds, CostWeights, HostConstants, Method, ProfilePoint, Sla},
    units::Bandwidth,
};

const MIB: u64 = 1 << 20;

/// A guest that writes nothing new but for `hot` MiB a second, forecast at `own` MiB/s: what a replay of it comes to, without the replay.
/// `T = memory / (B − hot)`, and it converges from `lcb = 1.2·hot` on.
fn guest(name: &str, memory_mib: u64, hot: u64, own: u64) -> Candidate {
    let question = Question {
        bandwidth: Bandwidth::Capped(BytesPerSecond(own * MIB)),
        downtime_limit: Duration::from_millis(300),
        time_budget: Some(Duration::from_secs(300)),
        host: HostConstants::default(),
        sla: Sla::default(),
        weights: CostWeights::default(),
    };
    let lcb = (hot * 6 / 5).max(1) * MIB;
    let at = |rate: u64| {
        let fits = rate >= lcb;
        let total_ms = if fits { 1000.0 * (memory_mib * MIB) as f64 / (rate - hot * MIB) as f64 } else { 300_000.0 };
        ProfilePoint {
            bandwidth: rate,
            probability: if fits { 1.0 } else { 0.0 },
            total_ms,
            downtime_ms: fits.then_some(50.0),
            iterations: 4,
            dirtied_pages: whole(total_ms * rate as f64 / 1000.0 / 4096.0),
        }
    };
    let profile: Vec<_> = (0..16).map(|i| at(whole(lcb as f64 / 2.0 * 16_f64.powf(f64::from(i) / 15.0)))).collect();
    let own = at(own * MIB);
    let forecast = Forecast {
        verdict: if own.probability >= 0.9 { Verdict::Converges } else { Verdict::Fails },
        sla_exceeded: false,
        low_confidence: false,
        probability: own.probability,
        method: Method::PatternCollector,
        iterations: own.iterations,
        convergence_ms: own.total_ms,
        downtime_ms: own.downtime_ms,
        total_ms: own.total_ms,
        dirtied_pages: own.dirtied_pages,
        transferred_bytes: 0,
        least_convergent_bandwidth: Some(lcb),
        cost: None,
        bounds: Bounds::default(),
        pattern: None,
        profile,
        baselines: Vec::new(),
    };
    let memory = Bytes(memory_mib * MIB);
    let outlook = Some(Outlook { question, forecast, guest: memory });
    Candidate { name: name.to_owned(), node: "a".to_owned(), cpu: MilliCpus(1000), memory, outlook }
}

fn terms(link: u64) -> Terms {
    Terms { link: Some(BytesPerSecond(link * MIB)), cap: None, per_node: 2, at_once: 5, seed: 1 }
}

fn free(memory_mib: u64, cpu: u64) -> Need {
    Need { memory: Bytes(memory_mib * MIB), cpu: MilliCpus(cpu) }
}

fn names<'a>(candidates: &'a [Candidate], members: &[usize]) -> Vec<&'a str> {
    members.iter().map(|at| candidates[*at].name.as_str()).collect()
}

#[test]
fn the_cheapest_that_frees_enough_and_why_not_the_others() {
    let mut vms =
        [guest("small", 256, 0, 100), guest("busy", 1024, 40, 100), guest("calm", 1024, 5, 100), guest("wild", 1024, 120, 100)];
    let found = plan(Wanted::Cheapest(free(512, 0)), &terms(100), &vms);
    assert_eq!(names(&vms, &found.ranking), ["small", "calm", "busy"]);
    let chosen = found.selection.unwrap();
    assert_eq!((names(&vms, &chosen.members), chosen.memory), (vec!["calm"], Bytes(1 << 30)));
    assert_eq!(chosen.cost, chosen.lower_bound);
    let figures = |at: usize| found.figures[at].unwrap();
    assert_eq!((figures(3).verdict, figures(3).cost), (Verdict::Fails, None));
    // Of the three that are large enough one would fail; of the two that would not, the mean.
    let random = chosen.saving.random_cost.unwrap();
    assert!((random.mean - f64::midpoint(figures(1).cost.unwrap(), figures(2).cost.unwrap())).abs() < 1e-12);
    assert!((chosen.saving.random_failure.unwrap().mean - 1.0 / 3.0).abs() < 1e-12);
    let all: f64 = found.ranking.iter().map(|at| figures(*at).cost.unwrap()).sum();
    assert!((chosen.saving.everything_cost - all).abs() < 1e-12);

    // At half the bandwidth the busy one does not converge any more; without a forecast nothing is ranked.
    vms[0].outlook = None;
    let found = plan(Wanted::Everything, &terms(45), &vms);
    assert_eq!(names(&vms, &found.ranking), ["calm"]);
    assert_eq!(found.figures[0], None);
    let found = plan(Wanted::Cheapest(free(2048, 0)), &terms(45), &vms);
    assert_eq!(found.selection, Err(Shortfall { memory: Bytes(1 << 30), cpu: MilliCpus(1000) }));
    assert_eq!(found.schedule, None);
}

#[test]
fn the_sla_counts_as_it_is_at_the_bandwidth_on_offer() {
    let mut vm = guest("vm", 1000, 0, 100);
    vm.outlook.as_mut().unwrap().question.sla.total_time = Some(Duration::from_secs(15));
    let vms = [vm];
    assert_eq!(plan(Wanted::Everything, &terms(100), &vms).ranking, [0]);
    let slower = plan(Wanted::Everything, &terms(50), &vms);
    assert!(slower.ranking.is_empty());
    assert_eq!(slower.figures[0].unwrap().verdict, Verdict::Borderline);
    assert_eq!(slower.selection.unwrap().members, Vec::<usize>::new());
}

#[test]
fn a_forecast_is_read_between_its_points_and_never_beyond() {
    let outlook = |vm: &Candidate| vm.outlook.clone().unwrap();
    let vm = outlook(&guest("vm", 1000, 30, 200));
    let course = Course::of(&vm, None);
    for rate in [40_u64, 75, 111, 199] {
        let rate = (rate * MIB) as f64;
        let exact = 1000.0 * 1000.0 * MIB as f64 / (rate - 30.0 * MIB as f64);
        // The chord of a convex curve is above it.
        assert!((0.999..1.1).contains(&(course.total_ms(rate) / exact)), "{rate}: {} beside {exact}", course.total_ms(rate));
        assert!(course.converges(rate));
    }
    assert_eq!(course.at(1e12), course.at((200 * MIB) as f64), "a cap is a cap");
    assert!(!course.converges((35 * MIB) as f64), "below the least convergent bandwidth");
    let capped = Course::of(&vm, Some(BytesPerSecond(40 * MIB)));
    assert_eq!(capped.at(1e12), course.at((40 * MIB) as f64));

    // A dry run that failed weighs more than a profile that says otherwise.
    let mut failed = vm.clone();
    (failed.forecast.probability, failed.forecast.downtime_ms) = (0.0, None);
    assert!(!Course::of(&failed, None).converges((100 * MIB) as f64));
    // A dry run that went well where the pattern saw no chance counts for its own bandwidth, and for nothing below.
    let mut proved = vm.clone();
    (proved.forecast.least_convergent_bandwidth, proved.forecast.profile) = (None, Vec::new());
    let proved = Course::of(&proved, None);
    assert!(proved.converges((200 * MIB) as f64) && !proved.converges((199 * MIB) as f64));
    // An empty answer is none, whatever is asked.
    let mut empty = vm.clone();
    (empty.forecast.probability, empty.forecast.profile, empty.forecast.least_convergent_bandwidth) = (0.0, Vec::new(), None);
    assert_eq!(Course::of(&empty, None).at(0.0).verdict, Verdict::Fails);
}

/// Two calm ones with caps of half the link go side by side; two that need most of it go one after the other.
#[test]
fn as_many_at_a_time_as_converge_and_help() {
    let calm = [guest("b", 1000, 0, 50), guest("a", 1000, 0, 50)];
    let side_by_side = plan(Wanted::Everything, &terms(100), &calm).schedule.unwrap();
    assert_eq!((side_by_side.per_node, side_by_side.makespan_ms.round()), (2, 20_000.0));
    assert_eq!(side_by_side.one_by_one.makespan_ms.round(), 40_000.0);
    assert!((side_by_side.lower_bound_ms - side_by_side.makespan_ms).abs() < 1.0);

    let busy = [guest("b", 1000, 50, 100), guest("a", 1000, 50, 100), guest("c", 1000, 0, 100)];
    let found = plan(Wanted::Everything, &terms(100), &busy).schedule.unwrap();
    assert_eq!((found.per_node, found.one_by_one.failing, found.all_at_once.failing), (1, 0, 2));
    assert!(found.all_at_once.makespan_ms > 300_000.0, "they would take their budget and fail: {found:?}");
    assert_eq!(names(&busy, &found.order)[0], "c", "where it makes no difference the cheapest first");
}

#[test]
fn links_are_of_nodes_and_limits_of_the_cluster() {
    let on = |node: &str, name: &str| Candidate { node: node.to_owned(), ..guest(name, 1000, 0, 100) };
    let vms = [on("a", "1"), on("a", "2"), on("b", "3"), on("b", "4")];
    let spread = plan(Wanted::Everything, &terms(100), &vms).schedule.unwrap();
    assert_eq!((spread.per_node, spread.makespan_ms.round()), (1, 20_000.0), "{spread:?}");
    assert_eq!(spread.one_by_one.makespan_ms.round(), 40_000.0);
    let narrow = plan(Wanted::Everything, &Terms { at_once: 1, ..terms(100) }, &vms).schedule.unwrap();
    assert_eq!(narrow.makespan_ms.round(), 40_000.0);
    // What one of two cannot use the other has.
    let uneven = [guest("slow", 100, 0, 10), guest("fast", 900, 0, 100)];
    let found = plan(Wanted::Everything, &terms(100), &uneven).schedule.unwrap();
    assert_eq!((found.per_node, found.makespan_ms.round()), (2, 10_000.0), "{found:?}");
    // Without a word on the link it is the line that the forecasts assume.
    let unknown = plan(Wanted::Everything, &Terms { link: None, ..terms(100) }, &uneven).schedule.unwrap();
    assert_eq!(unknown.makespan_ms.round(), 10_000.0);
}

/// All sets, for what is small enough.
fn cheapest_of_all(items: &[cover::Item], need: Need) -> Option<f64> {
    (0..1_u32 << items.len())
        .map(|set| items.iter().enumerate().filter(|(at, _)| set >> at & 1 == 1).map(|(_, item)| *item).collect::<Vec<_>>())
        .filter(|set| set.iter().fold(cover::Freed::default(), cover::Freed::with).suffices(need))
        .map(|set| set.iter().map(|item| item.cost).sum())
        .min_by(f64::total_cmp)
}

fn items(most: usize) -> impl Strategy<Value = Vec<cover::Item>> {
    // Few sizes, as VMs have, so that many are alike.
    let item = (0..2000_u32, 0..9_u64, 0..5_u64).prop_map(|(cost, memory, cpu)| cover::Item {
        cost: f64::from(cost) / 1000.0,
        memory,
        cpu,
    });
    prop::collection::vec(item, 0..=most)
}

/// A VM, and whether it is not eligible.
type Drawn = (cover::Item, bool);

/// The mean over all orders, one by one.
fn mean_over_orders(items: &[cover::Item], others: &[cover::Item], need: Need) -> (f64, f64) {
    fn walk(all: &mut [Drawn], fixed: usize, visit: &mut impl FnMut(&[Drawn])) {
        if fixed == all.len() {
            return visit(all);
        }
        for other in fixed..all.len() {
            all.swap(fixed, other);
            walk(all, fixed + 1, visit);
            all.swap(fixed, other);
        }
    }
    let prefix = |order: &[Drawn]| {
        let enough =
            |n: &usize| order[..*n].iter().fold(cover::Freed::default(), |freed, (item, _)| freed.with(item)).suffices(need);
        order[..(1..=order.len()).find(enough).unwrap_or(order.len())].to_vec()
    };
    let mean = |all: &[Drawn], value: fn(&[Drawn]) -> f64| {
        let (mut sum, mut orders) = (0.0, 0.0);
        walk(&mut all.to_vec(), 0, &mut |order| {
            sum += value(&prefix(order));
            orders += 1.0;
        });
        sum / orders
    };
    let good: Vec<_> = items.iter().map(|item| (*item, false)).collect();
    let all: Vec<_> = good.iter().copied().chain(others.iter().map(|item| (*item, true))).collect();
    (
        mean(&good, |set| set.iter().map(|(item, _)| item.cost).sum()),
        mean(&all, |set| if set.iter().any(|(_, bad)| *bad) { 1.0 } else { 0.0 }),
    )
}

fn candidates(most: usize) -> impl Strategy<Value = Vec<Candidate>> {
    let one = (1..40_u64, 0..60_u64, 20..120_u64, prop::bool::ANY, 0..4000_u64);
    prop::collection::vec(one, 1..=most).prop_map(|all| {
        let named = |(at, (memory, hot, own, there, cpu)): (usize, (u64, u64, u64, bool, u64))| Candidate {
            node: if there { "a" } else { "b" }.to_owned(),
            cpu: MilliCpus(cpu),
            ..guest(&at.to_string(), memory * 64, hot, own)
        };
        all.into_iter().enumerate().map(named).collect()
    })
}

proptest! {
    #[test]
    fn no_set_is_cheaper_than_the_cheapest(items in items(11), memory in 0..40_u64, cpu in 0..20_u64) {
        let need = Need { memory: Bytes(memory), cpu: MilliCpus(cpu) };
        let best = cheapest_of_all(&items, need);
        let found = cover::cheapest(&items, need);
        prop_assert_eq!(found.is_some(), best.is_some());
        if let (Some(found), Some(best)) = (found, best) {
            let members: Vec<_> = found.members.iter().map(|at| items[*at]).collect();
            prop_assert!(members.iter().fold(cover::Freed::default(), cover::Freed::with).suffices(need));
            let cost: f64 = members.iter().map(|item| item.cost).sum();
            prop_assert!((cost - best).abs() < 1e-6, "{} instead of {}", cost, best);
            prop_assert!((found.lower_bound - cost).abs() < 1e-6, "the search came to its end");
        }
    }

    /// Beyond what can be searched: the set suffices, and the bound is one.
    #[test]
    fn the_bound_of_a_large_set_holds(items in items(60), copies in 7..9_usize, memory in 1..2000_u64, cpu in 1..1000_u64) {
        let need = Need { memory: Bytes(memory), cpu: MilliCpus(cpu) };
        let many: Vec<_> = std::iter::repeat_n(items, copies).flatten().collect();
        if let Some(found) = cover::cheapest(&many, need) {
            let members: Vec<_> = found.members.iter().map(|at| many[*at]).collect();
            prop_assert!(members.iter().fold(cover::Freed::default(), cover::Freed::with).suffices(need));
            let cost: f64 = members.iter().map(|item| item.cost).sum();
            prop_assert!(found.lower_bound <= cost + 1e-9);
        }
    }

    #[test]
    fn blind_draws_are_counted_right(items in items(5), others in items(2), memory in 0..20_u64, cpu in 0..10_u64) {
        prop_assume!(!items.is_empty());
        let need = Need { memory: Bytes(memory), cpu: MilliCpus(cpu) };
        let (cost, failure) = mean_over_orders(&items, &others, need);
        prop_assert!((blind::cost(&items, need, 1).mean - cost).abs() < 1e-9);
        prop_assert!((blind::failure(&items, &others, need, 1).mean - failure).abs() < 1e-9);
    }

    #[test]
    fn a_selection_is_never_dearer_than_a_draw_or_everything(vms in candidates(16), memory in 1..4096_u64, link in 20..200_u64) {
        let found = plan(Wanted::Enough(free(memory, 0)), &terms(link), &vms);
        if let Ok(chosen) = &found.selection {
            let random = chosen.saving.random_cost.unwrap();
            prop_assert!(chosen.cost <= random.mean + 5.0 * random.error + 1e-9);
            prop_assert!(chosen.cost <= chosen.saving.everything_cost + 1e-9);
            prop_assert!(chosen.memory.0 >= memory * MIB && chosen.lower_bound <= chosen.cost);
            prop_assert_eq!(&plan(Wanted::Enough(free(memory, 0)), &terms(link), &vms), &found, "the same again");
        }
    }

    /// Against every order at every parallelism, by a simulation of its own in small steps.
    #[test]
    fn no_order_and_no_parallelism_is_shorter(vms in candidates(4), link in 20..200_u64, per_node in 1..4_usize, at_once in 1..5_usize) {
        let terms = Terms { per_node, at_once, ..terms(link) };
        let Some(found) = plan(Wanted::Everything, &terms, &vms).schedule else { return Ok(()) };
        let courses: Vec<_> = vms.iter().map(|vm| Course::of(vm.outlook.as_ref().unwrap(), None)).collect();
        let converges = |order: &[usize], k: usize| order.iter().all(|at| {
            let mates = order.iter().filter(|other| vms[**other].node == vms[*at].node).count();
            courses[*at].converges((link * MIB) as f64 / k.min(mates).min(at_once) as f64)
        });
        let mut least = f64::INFINITY;
        let mut shortest = |order: &[usize]| {
            for k in (1..=per_node).filter(|k| converges(order, *k)) {
                least = least.min(in_small_steps(&vms, &courses, order, k, at_once, (link * MIB) as f64));
            }
        };
        let mut orders = vec![found.order.clone()];
        for at in 0..found.order.len() {
            orders = orders.into_iter().flat_map(|order| (at..order.len()).map(move |other| {
                let mut order = order.clone();
                order.swap(at, other);
                order
            })).collect();
        }
        for order in &orders {
            shortest(order);
        }
        prop_assert!((found.makespan_ms / least - 1.0).abs() < 0.02, "{} beside {}", found.makespan_ms, least);
        prop_assert!(found.lower_bound_ms <= found.makespan_ms);
        prop_assert!(converges(&found.order, found.per_node));
    }
}

/// Steps of a thousandth of the shortest: whoever is under way gets further by its present pace.
fn in_small_steps(vms: &[Candidate], courses: &[Course<'_>], order: &[usize], per_node: usize, at_once: usize, link: f64) -> f64 {
    let step = order.iter().map(|at| courses[*at].total_ms(link)).fold(f64::INFINITY, f64::min) / 300.0;
    let mut waiting = order.to_vec();
    let mut running: Vec<(usize, f64)> = Vec::new();
    let (mut now, mut rates) = (0.0, Vec::new());
    loop {
        let before = running.len();
        while let Some(next) = waiting.iter().position(|at| {
            running.len() < at_once && running.iter().filter(|(other, _)| vms[*other].node == vms[*at].node).count() < per_node
        }) {
            running.push((waiting.remove(next), 0.0));
        }
        if running.is_empty() {
            return now;
        }
        if rates.len() != running.len() || before != running.len() {
            let ceilings: Vec<_> = running.iter().map(|(at, _)| (vms[*at].node.as_str(), courses[*at].ceiling())).collect();
            rates = drop_by_drop(&ceilings, link);
        }
        now += step;
        for ((at, done), rate) in running.iter_mut().zip(&rates) {
            *done += step / courses[*at].total_ms(*rate);
        }
        running.retain(|(_, done)| *done < 1.0);
    }
}

/// Each node's link, filled round by round: whoever can still take more gets an equal part of what is left.
fn drop_by_drop(ceilings: &[(&str, f64)], link: f64) -> Vec<f64> {
    let mut rates = vec![0.0; ceilings.len()];
    for node in ["a", "b"] {
        let here: Vec<_> = (0..ceilings.len()).filter(|i| ceilings[*i].0 == node).collect();
        for _ in 0..32 {
            let left = link - here.iter().map(|i| rates[*i]).sum::<f64>();
            let open: Vec<_> = here.iter().filter(|i| rates[**i] < ceilings[**i].1 * (1.0 - 1e-12)).collect();
            for i in &open {
                rates[**i] += (left / open.len() as f64).min(ceilings[**i].1 - rates[**i]);
            }
        }
    }
    rates
}

/// Sizes as VMs have them, costs that grow with the size and differ by a factor of up to four, and half of it to be freed.
#[test]
fn forty_vms_are_searched_to_the_end() {
    use rand::{RngExt, SeedableRng};
    let mut random = rand_pcg::Pcg64Mcg::seed_from_u64(40);
    for _ in 0..40 {
        let items: Vec<_> = (0..40)
            .map(|_| {
                let (memory, cpu) = (1 << random.random_range(1..7), 1 << random.random_range(0..5));
                cover::Item { cost: memory as f64 * random.random_range(0.5..2.0), memory, cpu }
            })
            .collect();
        let half = |of: fn(&cover::Item) -> u64| items.iter().map(of).sum::<u64>() / 2;
        let need = Need { memory: Bytes(half(|item| item.memory)), cpu: MilliCpus(half(|item| item.cpu)) };
        let found = cover::cheapest(&items, need).unwrap();
        let cost: f64 = found.members.iter().map(|at| items[*at].cost).sum();
        assert!((found.lower_bound - cost).abs() < 1e-6, "{} is not proved, only {}", cost, found.lower_bound);
    }
}
