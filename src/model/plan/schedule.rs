//! Migrations that share links: in which order, how many at a time, and how long all of it takes.
//!
//! In: who is to go, each with its course over all bandwidths, and the limits. Out: the order and parallelism with the least makespan
//! among those in which every member still converges, beside one by one and all at once.
//!
//! **The model.** A plan is an order and a number k: whenever fewer than k of a node's members (and fewer than the cluster's limit) are
//! under way, the next one of the order whose node has room is started. Those that leave a node share its link equally; what one cannot
//! use (its cap) the others have. A migration goes on at the pace of its present rate: it gets 1/T(B) further in each ms. It converges
//! only if it would with the least that it may have, a k-th of its link, all the time. The links of the nodes they go to are not counted.
//!
//! All k up to KubeVirt's limits are tried, each with all orders up to [`COUNTED`] members, and with the longest first and the
//! cheapest first beyond. The bound says how far from the least any of this can be.

use super::{Terms, course::Course};

/// All orders of up to so many members are tried: 720.
const COUNTED: usize = 6;
/// Makespans that differ by less than this share are the same: the cheaper ones go first, and fewer at a time.
const SAME: f64 = 1e-6;

/// One who is to go.
#[derive(Debug, Clone, Copy)]
pub(super) struct Job<'a> {
    /// Index of the candidate.
    pub(super) at: usize,
    pub(super) course: &'a Course<'a>,
    pub(super) node: &'a str,
    /// What the node's link offers, bytes per second.
    pub(super) link: f64,
}

/// When they go.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    /// In which order they are started, by their index.
    pub order: Vec<usize>,
    /// At most so many leave one node at the same time.
    pub per_node: usize,
    /// When the last one has arrived, ms after the start.
    pub makespan_ms: f64,
    /// No order and no parallelism takes less, ms.
    pub lower_bound_ms: f64,
    /// One after the other over the whole cluster, the cheapest first.
    pub one_by_one: Comparison,
    /// As a drain does it: all of them created at once, within KubeVirt's limits.
    pub all_at_once: Comparison,
}

/// What another way of doing it would have come to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Comparison {
    /// When the last one has arrived or failed, ms after the start.
    pub makespan_ms: f64,
    /// How many of them no longer converge.
    pub failing: usize,
}

/// The best order and parallelism. `jobs`: the cheapest first; each converges with its link to itself.
pub(super) fn schedule(jobs: &[Job<'_>], terms: &Terms) -> Schedule {
    let crowd = Crowd::of(jobs, terms);
    let cheapest: Vec<usize> = (0..jobs.len()).collect();
    let mut longest = cheapest.clone();
    let alone = |at: &usize| jobs.get(*at).map_or(0.0, |job| job.course.total_ms(job.link));
    longest.sort_by(|a, b| alone(b).total_cmp(&alone(a)));

    let mut best = (crowd.makespan(&cheapest, 1), 1, cheapest.clone());
    for per_node in (1..=crowd.most_per_node()).filter(|per_node| crowd.failing(*per_node) == 0) {
        let mut look = |order: &[usize]| {
            let makespan = crowd.makespan(order, per_node);
            if makespan < best.0 * (1.0 - SAME) {
                best = (makespan, per_node, order.to_vec());
            }
        };
        look(&cheapest);
        if jobs.len() <= COUNTED { permute(&mut cheapest.clone(), 0, &mut look) } else { look(&longest) }
    }
    let (makespan_ms, per_node, order) = best;
    let alone = Crowd { at_once: 1, ..Crowd::of(jobs, terms) };
    Schedule {
        order: order.iter().filter_map(|at| jobs.get(*at)).map(|job| job.at).collect(),
        per_node,
        makespan_ms,
        lower_bound_ms: crowd.lower_bound().min(makespan_ms),
        one_by_one: Comparison { makespan_ms: alone.makespan(&cheapest, 1), failing: alone.failing(1) },
        all_at_once: Comparison {
            makespan_ms: crowd.makespan(&cheapest, crowd.per_node),
            failing: crowd.failing(crowd.per_node),
        },
    }
}

/// Shows every order of what comes after the first `fixed`.
fn permute(order: &mut Vec<usize>, fixed: usize, look: &mut impl FnMut(&[usize])) {
    if fixed == order.len() {
        return look(order);
    }
    for other in fixed..order.len() {
        order.swap(fixed, other);
        permute(order, fixed + 1, look);
        order.swap(fixed, other);
    }
}

/// Those who are to go, by node, and the limits.
pub(super) struct Crowd<'a> {
    jobs: &'a [Job<'a>],
    /// The node of each, as an index.
    nodes: Vec<usize>,
    /// How many there are on each node.
    counts: Vec<usize>,
    pub(super) per_node: usize,
    pub(super) at_once: usize,
}

/// One that is under way.
struct Running {
    at: usize,
    done: f64,
    rate: f64,
}

impl<'a> Crowd<'a> {
    pub(super) fn of(jobs: &'a [Job<'a>], terms: &Terms) -> Self {
        let mut names: Vec<&str> = jobs.iter().map(|job| job.node).collect();
        names.sort_unstable();
        names.dedup();
        let nodes: Vec<usize> = jobs.iter().map(|job| names.binary_search(&job.node).unwrap_or_default()).collect();
        let counts = (0..names.len()).map(|node| nodes.iter().filter(|other| **other == node).count()).collect();
        Self { jobs, nodes, counts, per_node: terms.per_node.max(1), at_once: terms.at_once.max(1) }
    }

    /// More than this at a time from one node there never are.
    pub(super) fn most_per_node(&self) -> usize {
        self.counts.iter().copied().max().unwrap_or(1).min(self.per_node).min(self.at_once)
    }

    /// How many do not converge where up to so many at a time leave one node.
    pub(super) fn failing(&self, per_node: usize) -> usize {
        let share = |node: usize| self.counts.get(node).map_or(1, |count| per_node.min(*count).min(self.at_once)).max(1) as f64;
        self.jobs.iter().zip(&self.nodes).filter(|(job, node)| !job.course.converges(job.link / share(**node))).count()
    }

    /// When the last one is through, ms.
    pub(super) fn makespan(&self, order: &[usize], per_node: usize) -> f64 {
        let mut waiting = order.to_vec();
        let mut running: Vec<Running> = Vec::new();
        let mut now = 0.0;
        loop {
            self.start(&mut waiting, &mut running, per_node);
            self.share_links(&mut running);
            let left = |run: &Running| (1.0 - run.done) * self.total_ms(run);
            let Some(next) = running.iter().map(left).min_by(f64::total_cmp) else { return now };
            now += next;
            running.retain_mut(|run| {
                let total = self.total_ms(run);
                run.done = if total > 0.0 { run.done + next / total } else { 1.0 };
                // What has less than a nanosecond left is through.
                (1.0 - run.done) * total > 1e-6
            });
        }
    }

    fn total_ms(&self, run: &Running) -> f64 {
        self.jobs.get(run.at).map_or(0.0, |job| job.course.total_ms(run.rate))
    }

    fn node(&self, at: usize) -> Option<usize> {
        self.nodes.get(at).copied()
    }

    fn start(&self, waiting: &mut Vec<usize>, running: &mut Vec<Running>, per_node: usize) {
        let mut busy = vec![0; self.counts.len()];
        for run in running.iter() {
            if let Some(count) = self.node(run.at).and_then(|node| busy.get_mut(node)) {
                *count += 1;
            }
        }
        waiting.retain(|at| {
            let Some(count) = self.node(*at).and_then(|node| busy.get_mut(node)) else { return false };
            let room = running.len() < self.at_once && *count < per_node;
            if room {
                *count += 1;
                running.push(Running { at: *at, done: 0.0, rate: 0.0 });
            }
            !room
        });
    }

    /// Each an equal share of its node's link, less what it cannot use; that the others have.
    fn share_links(&self, running: &mut [Running]) {
        let ceiling = |run: &Running| self.jobs.get(run.at).map_or(0.0, |job| job.course.ceiling());
        running.sort_by(|a, b| {
            (self.node(a.at), ceiling(a)).partial_cmp(&(self.node(b.at), ceiling(b))).unwrap_or(std::cmp::Ordering::Equal)
        });
        for together in running.chunk_by_mut(|a, b| self.node(a.at) == self.node(b.at)) {
            let mut left = together.first().and_then(|run| self.jobs.get(run.at)).map_or(0.0, |job| job.link);
            let mut sharing = together.len();
            for run in together {
                run.rate = (left / sharing.max(1) as f64).min(ceiling(run));
                left -= run.rate;
                sharing -= 1;
            }
        }
    }

    /// No way of doing it takes less: each takes its time, each link carries what it has to, and the limits hold. ms.
    pub(super) fn lower_bound(&self) -> f64 {
        let alone = |job: &Job<'_>| job.course.total_ms(job.link);
        let sum = |node: Option<usize>, of: &dyn Fn(&Job<'_>) -> f64| -> f64 {
            let on = self.jobs.iter().zip(&self.nodes).filter(|(_, at)| node.is_none_or(|node| node == **at));
            on.map(|(job, _)| of(job)).sum()
        };
        let by_node = (0..self.counts.len()).flat_map(|node| {
            let work = sum(Some(node), &|job| job.course.least_work(job.link));
            [work, sum(Some(node), &alone) / self.per_node as f64]
        });
        let longest = self.jobs.iter().map(alone).fold(0.0, f64::max);
        by_node.chain([longest, sum(None, &alone) / self.at_once as f64]).fold(0.0, f64::max)
    }
}
