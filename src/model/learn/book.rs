//! What has been learned, as far as it is remembered: the statistics, and the text in which it outlives a restart.
//!
//! In: [`Lesson`]s and the time, or a text. Out: line rates, the switchover, biases, a text of bounded size.
//!
//! | what | statistics |
//! |---|---|
//! | rate of a pair of nodes | median of its last [`WINDOW`] rates of the last 30 days, from [`ENOUGH`] on |
//! | rate from a node | the 10 % quantile of its pairs' rates, rounded down: of up to ten pairs the least |
//! | rate in force | that, rounded down to whole MiB/s; another one only once it is off by more than 10 % |
//! | switchover | median of what the last [`SWITCHOVERS`] hand-overs took, in whole ms, from [`ENOUGH`] on; another one only once it is off by more than 10 % and 2 ms |
//! | bias of a method | median of ln(real / forecast) of the last [`REMEMBERED`], from [`ENOUGH`] on; it corrects nothing |
//!
//! Four odd rates in nine move a median no further than to the nearest of the others. Pairs with too few rates count together as
//! one.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Figure, LONGEST_SWITCHOVER, Lesson, is_a_line, whole};
use crate::model::{forecast::Method, units::BytesPerSecond};

/// So many rates are kept of a pair of nodes.
pub(super) const WINDOW: usize = 9;
/// Fewer than this are no statistics.
pub(super) const ENOUGH: usize = 5;
/// So many hand-overs are kept.
pub(super) const SWITCHOVERS: usize = 15;
/// So many forecasts are kept of a method, for each figure.
pub(super) const REMEMBERED: usize = 64;

/// So many migrations are kept that taught something, so that none teaches twice: more than end between two writes of the book.
pub(super) const TAUGHT: usize = 256;
/// The length of a UID, with room to spare.
const LONGEST_UID: usize = 64;

/// Seconds. A line that looked slow once must not stay so because nobody tries it again.
const REMEMBERED_FOR: u64 = 30 * 24 * 3600;
/// Of the rates of a node's pairs.
const LOW: f64 = 0.1;
/// A rate in force that is off by less stays: every VM of the node would have to be asked anew.
const WORTH: f64 = 0.1;
/// ms. A switchover in force that is off by less stays.
const WORTH_MS: f64 = 2.0;
/// ln(real / forecast) beyond this is no measure of anything: a factor of a thousand.
const FURTHEST: f64 = 6.9;
/// The length of a node's name in Kubernetes.
const LONGEST_NAME: usize = 253;
/// The format of [`Book::text`].
const FORMAT: u64 = 1;

/// Everything that is remembered. Its text is JSON, and a contract with itself over restarts and versions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Book {
    format: u64,
    /// The line rates that forecasts go by, by the node that is left.
    in_force: BTreeMap<String, BytesPerSecond>,
    /// Rates by the node that is left, then by the node that is reached; the latest last.
    pairs: BTreeMap<String, BTreeMap<String, Vec<Seen>>>,
    /// Of forecasts by the pattern.
    pattern_collector: Errors,
    /// Of forecasts by a dry run.
    dry_run: Errors,
    /// What a hand-over takes, as forecasts go by it, ms.
    #[serde(default)]
    switchover: Option<f64>,
    /// What hand-overs took, ms; the latest last.
    #[serde(default)]
    switchovers: Vec<f64>,
    /// UIDs of the migrations that taught last; the latest last.
    #[serde(default)]
    taught: Vec<String>,
}

/// When, in seconds since 1970, and how fast.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Seen(u64, BytesPerSecond);

/// ln(real / forecast), the latest last.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Errors {
    total_time: Vec<f64>,
    downtime: Vec<f64>,
    pages: Vec<f64>,
}

/// Why a text is no book.
#[derive(Debug, thiserror::Error)]
pub enum BookError {
    /// It was not written by migvisor, or not as a whole.
    #[error("it is not what migvisor writes: {0}")]
    Json(#[from] serde_json::Error),
    /// It was written by another version.
    #[error("its format is {0}, and this migvisor knows {FORMAT}: it is of another version")]
    Format(u64),
    /// It says what cannot be.
    #[error("it says what cannot be: {0}")]
    Absurd(String),
}

impl Default for Book {
    fn default() -> Self {
        Self {
            format: FORMAT,
            in_force: BTreeMap::new(),
            pairs: BTreeMap::new(),
            pattern_collector: Errors::default(),
            dry_run: Errors::default(),
            switchover: None,
            switchovers: Vec::new(),
            taught: Vec::new(),
        }
    }
}

impl Book {
    /// Reads what [`Self::text`] wrote.
    ///
    /// # Errors
    /// It is something else, of another version, or says what no migration could have taught.
    pub fn read(text: &str) -> Result<Self, BookError> {
        #[derive(Deserialize)]
        struct Head {
            format: u64,
        }
        let Head { format } = serde_json::from_str(text)?;
        if format != FORMAT {
            return Err(BookError::Format(format));
        }
        let book: Self = serde_json::from_str(text)?;
        book.check()?;
        Ok(book)
    }

    fn check(&self) -> Result<(), BookError> {
        let absurd = |what: String| Err(BookError::Absurd(what));
        let reached = self.pairs.values().flat_map(BTreeMap::keys);
        for node in self.in_force.keys().chain(self.pairs.keys()).chain(reached) {
            if node.is_empty() || node.len() > LONGEST_NAME {
                return absurd(format!("a node's name of {} bytes", node.len()));
            }
        }
        let seen = self.pairs.values().flat_map(BTreeMap::values);
        if let Some(long) = seen.clone().find(|seen| seen.len() > WINDOW) {
            return absurd(format!("{} rates of one pair of nodes", long.len()));
        }
        let rates = self.in_force.values().chain(seen.flatten().map(|Seen(_, rate)| rate));
        if let Some(rate) = rates.copied().find(|rate| !is_a_line(*rate)) {
            return absurd(format!("a line that carries {}", rate.human()));
        }
        for errors in [&self.pattern_collector, &self.dry_run].into_iter().flat_map(|of| Figure::ALL.map(|figure| of.of(figure)))
        {
            if errors.len() > REMEMBERED {
                return absurd(format!("{} errors of one figure", errors.len()));
            }
            if let Some(off) = errors.iter().find(|off| !(-FURTHEST..=FURTHEST).contains(*off)) {
                return absurd(format!("a forecast that is off by e^{off}"));
            }
        }
        if self.switchovers.len() > SWITCHOVERS {
            return absurd(format!("{} hand-overs", self.switchovers.len()));
        }
        if let Some(ms) = self.switchover.iter().chain(&self.switchovers).find(|ms| !(0.0..=LONGEST_SWITCHOVER).contains(*ms)) {
            return absurd(format!("a hand-over of {ms} ms"));
        }
        if self.taught.len() > TAUGHT {
            return absurd(format!("{} migrations that taught last", self.taught.len()));
        }
        if let Some(uid) = self.taught.iter().find(|uid| uid.is_empty() || uid.len() > LONGEST_UID) {
            return absurd(format!("a migration's UID of {} bytes", uid.len()));
        }
        Ok(())
    }

    /// As JSON of at most so many bytes: pairs of nodes that were used least recently are forgotten until it fits. `None` where
    /// the rest does not fit either.
    pub fn text(&mut self, most: usize) -> Option<String> {
        loop {
            // Such a structure has no keys that JSON cannot hold: it always becomes a text.
            let text = serde_json::to_string(self).ok()?;
            if text.len() <= most {
                return Some(text);
            }
            let mut by_use: Vec<_> = self
                .pairs
                .iter()
                .flat_map(|(from, pairs)| pairs.iter().map(move |(to, seen)| (last_use(seen), from.clone(), to.clone())))
                .collect();
            if by_use.is_empty() {
                return None;
            }
            by_use.sort();
            for (_, from, to) in by_use.iter().take(by_use.len().div_ceil(16)) {
                if let Some(pairs) = self.pairs.get_mut(from) {
                    pairs.remove(to);
                }
            }
            self.tidy();
        }
    }

    /// Takes in what a migration, by its UID, has taught. Once: whoever cannot tell whether it is in already may try again.
    pub fn learn_from(&mut self, migration: &str, lessons: &[Lesson]) {
        let named = (1..=LONGEST_UID).contains(&migration.len());
        if named && self.taught.iter().any(|uid| uid == migration) {
            return;
        }
        for lesson in lessons {
            self.learn(lesson);
        }
        if named && !lessons.is_empty() {
            self.taught.push(migration.to_owned());
            keep_last(&mut self.taught, TAUGHT);
        }
    }

    /// Takes a lesson in.
    pub(super) fn learn(&mut self, lesson: &Lesson) {
        match lesson {
            Lesson::Rate { from, to, at, rate } => {
                let seen = self.pairs.entry(from.clone()).or_default().entry(to.clone()).or_default();
                seen.push(Seen(*at, *rate));
                keep_last(seen, WINDOW);
            }
            Lesson::Error { method, figure, off } => {
                let errors = match method {
                    Method::PatternCollector => &mut self.pattern_collector,
                    Method::DryRun => &mut self.dry_run,
                };
                let of_figure = match figure {
                    Figure::TotalTime => &mut errors.total_time,
                    Figure::Downtime => &mut errors.downtime,
                    Figure::Pages => &mut errors.pages,
                };
                of_figure.push(round(off.clamp(-FURTHEST, FURTHEST)));
                keep_last(of_figure, REMEMBERED);
            }
            Lesson::Switchover { ms } => {
                self.switchovers.push(round(ms.clamp(0.0, LONGEST_SWITCHOVER)));
                keep_last(&mut self.switchovers, SWITCHOVERS);
            }
        }
    }

    /// Forgets what is too old, and has what is known by `now`, in seconds since 1970, come into force.
    pub fn settle(&mut self, now: u64) {
        let oldest = now.saturating_sub(REMEMBERED_FOR);
        for seen in self.pairs.values_mut().flat_map(BTreeMap::values_mut) {
            seen.retain(|Seen(at, _)| *at >= oldest);
        }
        self.tidy();
        let known = self.pairs.iter().filter_map(|(node, pairs)| {
            let rate = achieved(pairs)?;
            Some((node.clone(), in_force(self.in_force.get(node).copied(), rate)))
        });
        self.in_force = known.collect();
        if let Some(ms) = median(self.switchovers.clone()).filter(|_| self.switchovers.len() >= ENOUGH) {
            let stays = self.switchover.is_some_and(|before| (ms - before).abs() <= (before * WORTH).max(WORTH_MS));
            self.switchover = if stays { self.switchover } else { Some(ms.round()) };
        }
    }

    /// Without what is empty, and without rates that nothing is known of any more.
    fn tidy(&mut self) {
        let Self { in_force, pairs, .. } = self;
        for of_node in pairs.values_mut() {
            of_node.retain(|_, seen| !seen.is_empty());
        }
        pairs.retain(|_, of_node| !of_node.is_empty());
        in_force.retain(|node, _| pairs.contains_key(node));
    }

    /// What the line from a node carries, as forecasts should go by it.
    pub fn line_rate(&self, node: &str) -> Option<BytesPerSecond> {
        self.in_force.get(node).copied()
    }

    /// What a hand-over takes, as forecasts should go by it, ms.
    pub fn switchover(&self) -> Option<f64> {
        self.switchover
    }

    /// How many pairs of nodes something is known of.
    pub fn pairs(&self) -> usize {
        self.pairs.values().map(BTreeMap::len).sum()
    }

    /// The median of ln(real / forecast): above 0 where more was needed than foretold. `None`: too few forecasts have come to
    /// their end.
    pub fn bias(&self, method: Method, figure: Figure) -> Option<f64> {
        let errors = match method {
            Method::PatternCollector => self.pattern_collector.of(figure),
            Method::DryRun => self.dry_run.of(figure),
        };
        if errors.len() < ENOUGH { None } else { median(errors.clone()).map(round) }
    }
}

impl Errors {
    fn of(&self, figure: Figure) -> &Vec<f64> {
        match figure {
            Figure::TotalTime => &self.total_time,
            Figure::Downtime => &self.downtime,
            Figure::Pages => &self.pages,
        }
    }
}

/// What the line from a node carries, from the rates of its pairs.
fn achieved(pairs: &BTreeMap<String, Vec<Seen>>) -> Option<f64> {
    let rates = |seen: &[Seen]| -> Vec<f64> { seen.iter().map(|Seen(_, rate)| rate.0 as f64).collect() };
    let (many, few): (Vec<&Vec<Seen>>, Vec<&Vec<Seen>>) = pairs.values().partition(|seen| seen.len() >= ENOUGH);
    let together: Vec<f64> = few.into_iter().flat_map(|seen| rates(seen)).collect();
    let mut medians: Vec<f64> = many.into_iter().filter_map(|seen| median(rates(seen))).collect();
    if together.len() >= ENOUGH {
        medians.extend(median(together));
    }
    low(medians)
}

/// The rate in force from now on.
fn in_force(before: Option<BytesPerSecond>, achieved: f64) -> BytesPerSecond {
    if let Some(before) = before.filter(|before| (achieved / before.0 as f64 - 1.0).abs() <= WORTH) {
        return before;
    }
    let BytesPerSecond(rate) = whole(achieved);
    let unit = if rate < 16 << 20 { 1 << 10 } else { 1 << 20 };
    BytesPerSecond(rate - rate % unit)
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let below = values.get(values.len().saturating_sub(1) / 2)?;
    let above = values.get(values.len() / 2)?;
    Some(f64::midpoint(*below, *above))
}

fn low(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a length")]
    let at = (values.len().saturating_sub(1) as f64 * LOW) as usize;
    values.get(at).copied()
}

fn keep_last<T>(values: &mut Vec<T>, most: usize) {
    values.drain(..values.len().saturating_sub(most));
}

fn last_use(seen: &[Seen]) -> u64 {
    seen.iter().map(|Seen(at, _)| *at).max().unwrap_or_default()
}

/// Digits beyond these would be noise in an object.
fn round(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}
