//! The cheapest set of VMs that frees enough memory and enough processors: a covering problem with two constraints.
//!
//! In: what each costs and frees, and the need. Out: a set, and a bound below which no set can be. Branch and bound over the surrogate
//! relaxation: both constraints are added up, weighed λ to 1 − λ, and the sum is filled fractionally in order of cost per weight. The
//! best λ gives the bound of the linear relaxation. Who is dearer than another and frees no more is taken only together with it. The search
//! ends after [`NODES`] nodes; what it has by then is not proved to be the least, and the bound is that of the relaxation.

use super::Need;

/// Nodes of the search. 40 VMs, half of whose memory and processors is to be freed, need 400 at the median and 4 000 at worst (of 40
/// draws).
const NODES: u32 = 200_000;
/// More VMs than this are not searched: the first set is improved, and the bound stated.
const SEARCHED: usize = 400;
/// Values of λ that are looked at for the bound of the root.
const LAMBDAS: u32 = 64;
/// Costs are sums of figures with four digits: what differs by less is the same.
const SAME: f64 = 1e-9;

/// One VM.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Item {
    /// Not negative.
    pub(super) cost: f64,
    /// Bytes that it frees.
    pub(super) memory: u64,
    /// Thousandths of a processor that it frees.
    pub(super) cpu: u64,
}

/// A set that frees enough.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Cover {
    /// In ascending order.
    pub(super) members: Vec<usize>,
    /// No set costs less; what the members cost where the search came to its end.
    pub(super) lower_bound: f64,
}

/// What is still to be freed, each as a share of the need; 0 or less: nothing.
type Rest = [f64; 2];

/// The cheapest set; `None` where all together do not suffice.
pub(super) fn cheapest(items: &[Item], need: Need) -> Option<Cover> {
    let share = |frees: u64, need: u64| if need == 0 { 0.0 } else { frees as f64 / need as f64 };
    let weights: Vec<Rest> = items.iter().map(|it| [share(it.memory, need.memory.0), share(it.cpu, need.cpu.0)]).collect();
    let rest = [need.memory.0, need.cpu.0].map(|need| if need == 0 { 0.0 } else { 1.0 });
    if !items.iter().fold(Freed::default(), Freed::with).suffices(need) {
        return None;
    }
    let costs: Vec<f64> = items.iter().map(|item| item.cost).collect();
    // More than the need helps no more than the need.
    let capped: Vec<Rest> = weights.iter().map(|weight| weight.map(|weight| weight.min(1.0))).collect();
    let (lambda, relaxed) = (0..=LAMBDAS)
        .map(|step| f64::from(step) / f64::from(LAMBDAS))
        .map(|lambda| (lambda, Relaxation::new(&costs, &capped, lambda).bound(rest, |_| true)))
        .max_by(|a, b| a.1.total_cmp(&b.1))?;
    let relaxations = [lambda, 0.0, 1.0].map(|lambda| Relaxation::new(&costs, &capped, lambda));

    let mut best: Option<Vec<usize>> = None;
    for relaxation in &relaxations {
        let greedy = greedy(items, need, &relaxation.order);
        if best.as_ref().is_none_or(|best| cost(items, &greedy) < cost(items, best) - SAME) {
            best = Some(greedy);
        }
    }
    let best = best?;
    if items.len() > SEARCHED {
        let cost = cost(items, &best);
        return Some(Cover { members: best, lower_bound: relaxed.min(cost) });
    }
    let mut search = Search {
        items,
        need,
        capped: &capped,
        relaxations: &relaxations,
        betters: betters(items),
        marks: vec![Mark::Free; items.len()],
        best_cost: cost(items, &best),
        best,
        nodes: NODES,
    };
    search.branch(0, Freed::default(), rest, 0.0);
    let lower_bound = if search.nodes > 0 { search.best_cost } else { relaxed.min(search.best_cost) };
    Some(Cover { members: search.best, lower_bound })
}

fn cost(items: &[Item], members: &[usize]) -> f64 {
    members.iter().filter_map(|at| items.get(*at)).map(|item| item.cost).sum()
}

/// What some VMs free together.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Freed {
    memory: u128,
    cpu: u128,
}

impl Freed {
    pub(super) fn with(self, item: &Item) -> Self {
        Self { memory: self.memory + u128::from(item.memory), cpu: self.cpu + u128::from(item.cpu) }
    }

    fn without(self, item: &Item) -> Self {
        Self { memory: self.memory.saturating_sub(item.memory.into()), cpu: self.cpu.saturating_sub(item.cpu.into()) }
    }

    pub(super) fn suffices(self, need: Need) -> bool {
        self.memory >= need.memory.0.into() && self.cpu >= need.cpu.0.into()
    }
}

/// In this order until it is enough; then without whom that is not needed, the dearest first, and with single ones swapped for cheaper
/// ones, while that helps.
fn greedy(items: &[Item], need: Need, order: &[usize]) -> Vec<usize> {
    let mut freed = Freed::default();
    let mut members = vec![false; items.len()];
    for (at, item) in order.iter().filter_map(|at| Some((*at, items.get(*at)?))) {
        if freed.suffices(need) {
            break;
        }
        freed = freed.with(item);
        if let Some(member) = members.get_mut(at) {
            *member = true;
        }
    }
    let mut by_cost: Vec<(usize, &Item)> = items.iter().enumerate().collect();
    by_cost.sort_by(|a, b| a.1.cost.total_cmp(&b.1.cost).then(a.0.cmp(&b.0)));
    let is = |members: &[bool], at: usize| members.get(at).copied().unwrap_or(false);
    loop {
        let dearest = || by_cost.iter().rev().filter(|(at, _)| is(&members, *at));
        let change =
            dearest().find(|(_, item)| freed.without(item).suffices(need)).map(|(out, item)| (*out, *item, None)).or_else(|| {
                dearest().find_map(|(out, item)| {
                    let cheaper = by_cost.iter().take_while(|(_, other)| other.cost < item.cost - SAME);
                    let mut outside = cheaper.filter(|(at, _)| !is(&members, *at));
                    let found = outside.find(|(_, other)| freed.without(item).with(other).suffices(need))?;
                    Some((*out, *item, Some(*found)))
                })
            });
        let Some((out, item, with)) = change else { break };
        freed = freed.without(item);
        if let Some(member) = members.get_mut(out) {
            *member = false;
        }
        if let Some((at, other)) = with {
            freed = freed.with(other);
            if let Some(member) = members.get_mut(at) {
                *member = true;
            }
        }
    }
    (0..items.len()).filter(|at| is(&members, *at)).collect()
}

/// Both constraints as one, and the order in which it is filled.
struct Relaxation<'a> {
    costs: &'a [f64],
    lambda: f64,
    weights: Vec<f64>,
    order: Vec<usize>,
}

impl<'a> Relaxation<'a> {
    fn new(costs: &'a [f64], capped: &[Rest], lambda: f64) -> Self {
        let weights: Vec<f64> = capped.iter().map(|[memory, cpu]| lambda * memory + (1.0 - lambda) * cpu).collect();
        let ratio = |at: usize| match (costs.get(at), weights.get(at)) {
            (Some(cost), Some(weight)) if *weight > 0.0 => cost / weight,
            _ => f64::INFINITY,
        };
        let mut order: Vec<usize> = (0..costs.len()).collect();
        order.sort_by(|a, b| ratio(*a).total_cmp(&ratio(*b)).then(a.cmp(b)));
        Self { costs, lambda, weights, order }
    }

    /// What the rest costs at least, taken from those that are free to be taken; infinite where they do not suffice.
    fn bound(&self, rest: Rest, free: impl Fn(usize) -> bool) -> f64 {
        let mut left = self.lambda * rest[0].max(0.0) + (1.0 - self.lambda) * rest[1].max(0.0);
        let mut sum = 0.0;
        for at in &self.order {
            if left <= SAME {
                return sum;
            }
            let (Some(cost), Some(weight)) = (self.costs.get(*at), self.weights.get(*at)) else { continue };
            if *weight > 0.0 && free(*at) {
                sum += cost * (left / weight).min(1.0);
                left -= weight;
            }
        }
        if left <= SAME { sum } else { f64::INFINITY }
    }
}

/// For each who is no dearer and frees no less, its equals with a lower index among them.
fn betters(items: &[Item]) -> Vec<Vec<usize>> {
    let better = |(i, a): (usize, &Item), (j, b): (usize, &Item)| {
        i != j
            && a.cost <= b.cost
            && a.memory >= b.memory
            && a.cpu >= b.cpu
            && ((a.cost, a.memory, a.cpu) != (b.cost, b.memory, b.cpu) || i < j)
    };
    items
        .iter()
        .enumerate()
        .map(|worse| items.iter().enumerate().filter(|it| better(*it, worse)).map(|(at, _)| at).collect())
        .collect()
}

/// Where a VM stands on the way to a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mark {
    Free,
    Taken,
    Out,
}

/// Depth first, the best in cost per weight first, with and then without it.
struct Search<'a> {
    items: &'a [Item],
    need: Need,
    capped: &'a [Rest],
    relaxations: &'a [Relaxation<'a>; 3],
    betters: Vec<Vec<usize>>,
    marks: Vec<Mark>,
    best: Vec<usize>,
    best_cost: f64,
    nodes: u32,
}

impl Search<'_> {
    fn branch(&mut self, depth: usize, freed: Freed, rest: Rest, cost: f64) {
        if self.nodes == 0 {
            return;
        }
        self.nodes -= 1;
        if freed.suffices(self.need) {
            if cost < self.best_cost - SAME {
                self.best_cost = cost;
                self.best = (0..self.items.len()).filter(|at| self.is(*at, Mark::Taken)).collect();
            }
            return;
        }
        let Some(&at) = self.relaxations[0].order.get(depth) else { return };
        let (Some(item), Some(weight)) = (self.items.get(at).copied(), self.capped.get(at)) else { return };
        // What is still missing costs at least this.
        let free = |at: usize| self.is(at, Mark::Free);
        let bound = self.relaxations.iter().map(|relaxation| relaxation.bound(rest, free)).fold(0.0, f64::max);
        if cost + bound >= self.best_cost - SAME {
            return;
        }
        let [memory, cpu] = weight;
        let less = [rest[0] - memory, rest[1] - cpu];
        let lacks_better = self.betters.get(at).is_some_and(|betters| betters.iter().any(|at| self.is(*at, Mark::Out)));
        if !lacks_better {
            self.mark(at, Mark::Taken);
            self.branch(depth + 1, freed.with(&item), less, cost + item.cost);
        }
        self.mark(at, Mark::Out);
        self.branch(depth + 1, freed, rest, cost);
        self.mark(at, Mark::Free);
    }

    fn is(&self, at: usize, mark: Mark) -> bool {
        self.marks.get(at) == Some(&mark)
    }

    fn mark(&mut self, at: usize, mark: Mark) {
        if let Some(slot) = self.marks.get_mut(at) {
            *slot = mark;
        }
    }
}
