//! Which VMs to move, in which order, and how many at a time. Pure: from forecasts to a plan.
//!
//! In: candidates with their forecasts, what is wanted, the link of each source node, KubeVirt's limits, a seed. Out: every candidate
//! ranked, the selection, the order and parallelism, and what is saved.
//!
//! | module | what |
//! |---|---|
//! | `course` | one migration at any bandwidth, read between the points of its profile |
//! | `cover` | the cheapest set that frees enough |
//! | `blind` | what somebody who knows nothing would pay |
//! | `schedule` | migrations that share links: order, parallelism, makespan |
//!
//! **Costs** are those of a migration that has its source node's link to itself (or its own cap, where that is less), each weighed as its
//! own question says. **Eligible** is who then converges within its SLA, with a probability of at least 0.9, read from its profile.

mod blind;
mod course;
mod cover;
mod schedule;
#[cfg(test)]
mod tests;

pub use course::Figures;
pub use schedule::{Comparison, Schedule};

use self::course::Course;
use super::{
    forecast::{Forecast, Question, Verdict},
    units::{Bytes, BytesPerSecond, MilliCpus},
};

/// A VM that might be moved.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// What it is called; the last criterion where two are alike.
    pub name: String,
    /// The node that it would leave.
    pub node: String,
    /// Processors that leaving frees.
    pub cpu: MilliCpus,
    /// Memory that leaving frees.
    pub memory: Bytes,
    /// What moving it would be like; `None`: it cannot be moved, or nobody knows.
    pub outlook: Option<Outlook>,
}

/// What moving a VM would be like.
#[derive(Debug, Clone, PartialEq)]
pub struct Outlook {
    /// What was asked.
    pub question: Question,
    /// The answer, with its profile.
    pub forecast: Forecast,
    /// The guest's memory.
    pub guest: Bytes,
}

/// What is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// The cheapest one VM that frees so much.
    Cheapest(Need),
    /// The cheapest set of VMs that together free so much.
    Enough(Need),
    /// Every VM that can go.
    Everything,
}

/// So much is to be freed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Need {
    /// Memory.
    pub memory: Bytes,
    /// Processors.
    pub cpu: MilliCpus,
}

/// Under what the plan would run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terms {
    /// What each source node's link offers to the plan; `None`: the rate of the line that the forecasts assume.
    pub link: Option<BytesPerSecond>,
    /// No migration may have more than this.
    pub cap: Option<BytesPerSecond>,
    /// At most so many leave one node at the same time (KubeVirt's `parallelOutboundMigrationsPerNode`); at least 1.
    pub per_node: usize,
    /// At most so many run at the same time (KubeVirt's `parallelMigrationsPerCluster`); at least 1.
    pub at_once: usize,
    /// For what is estimated by drawing lots.
    pub seed: u64,
}

/// The plan. Candidates are meant by their index.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// What the link of each candidate's node offers; 0 where neither the terms nor any forecast there say.
    pub links: Vec<BytesPerSecond>,
    /// Each candidate at the bandwidth on offer; `None` where it has no outlook.
    pub figures: Vec<Option<Figures>>,
    /// Who is eligible, the cheapest first.
    pub ranking: Vec<usize>,
    /// Who is to go.
    pub selection: Result<Selection, Shortfall>,
    /// When; `None` where nobody is to go.
    pub schedule: Option<Schedule>,
}

/// Who is to go.
#[derive(Debug, Clone, PartialEq)]
pub struct Selection {
    /// The cheapest first.
    pub members: Vec<usize>,
    /// The sum of their costs.
    pub cost: f64,
    /// No selection that would do costs less than this; equal to `cost` where that is proved to be the least.
    pub lower_bound: f64,
    /// Memory that they free.
    pub memory: Bytes,
    /// Processors that they free.
    pub cpu: MilliCpus,
    /// What is saved.
    pub saving: Saving,
}

/// What a selection costs beside what else one might have done.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Saving {
    /// What it would cost on average to move VMs drawn at random until the need is met, of those that are eligible; `None` where
    /// everything is wanted: there is nothing to draw.
    pub random_cost: Option<Estimate>,
    /// How likely such a draw, of all VMs with a forecast, is to meet one that is not eligible.
    pub random_failure: Option<Estimate>,
    /// The cost of moving everything that is eligible.
    pub everything_cost: f64,
}

/// A mean over random draws.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// The mean.
    pub mean: f64,
    /// Its standard error; 0 where all draws were counted.
    pub error: f64,
}

/// Why nobody can be selected: the most that all eligible VMs (or the one that frees most) would free.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Shortfall {
    /// Memory.
    pub memory: Bytes,
    /// Processors.
    pub cpu: MilliCpus,
}

/// Makes the plan.
pub fn plan(wanted: Wanted, terms: &Terms, candidates: &[Candidate]) -> Plan {
    let courses: Vec<_> = candidates.iter().map(|it| it.outlook.as_ref().map(|it| Course::of(it, terms.cap))).collect();
    let links = links(terms, candidates);
    let link = |at: usize| links.get(at).map_or(0.0, |link| link.0 as f64);
    let figures: Vec<_> =
        courses.iter().enumerate().map(|(at, course)| course.as_ref().map(|course| course.at(link(at)))).collect();
    let (mut ranking, mut failing) = (Vec::new(), Vec::new());
    for (at, figures) in figures.iter().enumerate() {
        match figures {
            Some(Figures { verdict: Verdict::Converges, cost: Some(_), .. }) => ranking.push(at),
            Some(_) => failing.push(at),
            None => {}
        }
    }
    let cost = |at: usize| figures.get(at).copied().flatten().and_then(|figures| figures.cost).unwrap_or_default();
    let name = |at: usize| candidates.get(at).map(|candidate| &candidate.name);
    ranking.sort_by(|a, b| cost(*a).total_cmp(&cost(*b)).then_with(|| name(*a).cmp(&name(*b))));

    let item = |at: usize| {
        let (cpu, memory) = candidates.get(at).map_or((0, 0), |it| (it.cpu.0, it.memory.0));
        cover::Item { cost: cost(at), memory, cpu }
    };
    let items: Vec<_> = ranking.iter().map(|at| item(*at)).collect();
    let others: Vec<_> = failing.iter().map(|at| item(*at)).collect();
    let selection = select(wanted, &items, &others, terms.seed).map(|mut selection| {
        selection.members = selection.members.iter().filter_map(|at| ranking.get(*at)).copied().collect();
        selection
    });
    let schedule = selection.as_ref().ok().filter(|selection| !selection.members.is_empty()).map(|selection| {
        let jobs: Vec<_> = selection
            .members
            .iter()
            .filter_map(|at| {
                let (course, candidate) = (courses.get(*at)?.as_ref()?, candidates.get(*at)?);
                Some(schedule::Job { at: *at, course, node: &candidate.node, link: link(*at) })
            })
            .collect();
        schedule::schedule(&jobs, terms)
    });
    Plan { links, figures, ranking, selection, schedule }
}

/// One migration at this rate, of which it has no more than `cap`.
pub fn figures(outlook: &Outlook, cap: Option<BytesPerSecond>, rate: BytesPerSecond) -> Figures {
    Course::of(outlook, cap).at(rate.0 as f64)
}

/// What the link of each candidate's node offers, bytes per second.
fn links(terms: &Terms, candidates: &[Candidate]) -> Vec<BytesPerSecond> {
    // Questions of one node may disagree on its line where some were asked before more was learned: the least is safe.
    let mut lines = std::collections::HashMap::new();
    for candidate in candidates {
        if let Some(outlook) = &candidate.outlook {
            let rate = outlook.question.host.line_rate;
            lines.entry(&candidate.node).and_modify(|least: &mut BytesPerSecond| *least = rate.min(*least)).or_insert(rate);
        }
    }
    let link = |candidate: &Candidate| terms.link.or_else(|| lines.get(&candidate.node).copied()).unwrap_or_default();
    candidates.iter().map(link).collect()
}

/// The selection among `items`, the cheapest first, meant by their place in them. `others` are not eligible.
fn select(wanted: Wanted, items: &[cover::Item], others: &[cover::Item], seed: u64) -> Result<Selection, Shortfall> {
    let everything_cost = items.iter().map(|item| item.cost).sum();
    let sum = |of: fn(&cover::Item) -> u64| items.iter().map(of).fold(0, u64::saturating_add);
    let most = |of: fn(&cover::Item) -> u64| items.iter().map(of).max().unwrap_or_default();
    let (memory, cpu) = (|item: &cover::Item| item.memory, |item: &cover::Item| item.cpu);
    let (members, lower_bound, lots) = match wanted {
        Wanted::Cheapest(need) => {
            let fits = |item: &&cover::Item| item.memory >= need.memory.0 && item.cpu >= need.cpu.0;
            let short = Shortfall { memory: Bytes(most(memory)), cpu: MilliCpus(most(cpu)) };
            let (first, chosen) = items.iter().enumerate().find(|(_, item)| fits(item)).ok_or(short)?;
            // One that is too small is no pick: every draw ends with its first.
            let only = |items: &[cover::Item]| items.iter().filter(fits).copied().collect::<Vec<_>>();
            (vec![first], chosen.cost, Some((Need::default(), only(items), only(others))))
        }
        Wanted::Enough(need) => {
            let short = Shortfall { memory: Bytes(sum(memory)), cpu: MilliCpus(sum(cpu)) };
            let found = cover::cheapest(items, need).ok_or(short)?;
            (found.members, found.lower_bound, Some((need, items.to_vec(), others.to_vec())))
        }
        Wanted::Everything => ((0..items.len()).collect(), everything_cost, None),
    };
    let chosen = || members.iter().filter_map(|at| items.get(*at));
    let cost: f64 = chosen().map(|item| item.cost).sum();
    Ok(Selection {
        cost,
        lower_bound: lower_bound.min(cost),
        memory: Bytes(chosen().map(memory).fold(0, u64::saturating_add)),
        cpu: MilliCpus(chosen().map(cpu).fold(0, u64::saturating_add)),
        saving: Saving {
            random_cost: lots.as_ref().map(|(need, items, _)| blind::cost(items, *need, seed)),
            random_failure: lots.as_ref().map(|(need, items, others)| blind::failure(items, others, *need, seed)),
            everything_cost,
        },
        members,
    })
}
