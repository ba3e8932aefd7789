//! What past migrations teach: how fast the line from a node is, how long a hand-over takes, and how far forecasts are off. Pure.
//!
//! In: what a migration has sent, or a forecast beside what it really was. Out: [`Lesson`]s, and the [`Book`] that holds them.
//!
//! A rate only ever says "at least": what set-up, zero pages and the last passes take is in it.

mod book;

use std::time::Duration;

pub use book::{Book, BookError};

use super::{
    forecast::{HostConstants, Method},
    units::{Bandwidth, Bytes, BytesPerSecond, FASTEST, PAGE, SLOWEST},
};

/// Less data than this tells of latencies, not of a line: 64 MiB.
const FEWEST_PAGES: u64 = (64 << 20) / PAGE;
/// The same of time.
const SHORTEST: Duration = Duration::from_secs(1);
/// Zero pages take time and send nothing: no more than this share of it.
const MOST_ZEROS: f64 = 0.1;
/// A rate from this share of the cap on is the cap's: the windows of QEMU's limiter are never quite used up.
const AT_CAP: f64 = 0.75;
/// A hand-over of more, in ms, is none: QEMU waited for something.
const LONGEST_SWITCHOVER: f64 = 5000.0;

/// What a migration has sent, and under which cap.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Transfer {
    /// On the wire.
    pub wire: Bytes,
    /// Pages sent whole.
    pub pages: u64,
    /// Zero pages sent.
    pub zero_pages: u64,
    /// From `migrate` to the end.
    pub total: Duration,
    /// QEMU's cap.
    pub cap: Bandwidth,
}

impl Transfer {
    /// What the line carried. `None` where something else may have set the pace: the cap, zero pages, compression (fewer bytes
    /// than pages), or too little was sent.
    pub fn line_rate(&self) -> Option<BytesPerSecond> {
        let ms = self.total.as_secs_f64() * 1000.0;
        let zeros_ms = self.zero_pages as f64 / HostConstants::default().zero_pages_per_ms;
        let compressed = self.wire.0 < self.pages.saturating_mul(PAGE);
        if self.total < SHORTEST || self.pages < FEWEST_PAGES || zeros_ms > ms * MOST_ZEROS || compressed {
            return None;
        }
        let rate = whole(self.wire.0 as f64 * 1000.0 / ms);
        let capped = self.cap.cap().is_some_and(|cap| rate.0 as f64 >= cap.0 as f64 * AT_CAP);
        (!capped && is_a_line(rate)).then_some(rate)
    }
}

fn is_a_line(rate: BytesPerSecond) -> bool {
    (SLOWEST..=FASTEST).contains(&rate)
}

fn whole(rate: f64) -> BytesPerSecond {
    let rate = rate.clamp(0.0, 1e18);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped; what is no number becomes 0")]
    let whole = rate as u64;
    BytesPerSecond(whole)
}

/// What is foretold of a migration, and can be held against what it really was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Figure {
    /// Total time.
    TotalTime,
    /// The guest's stop.
    Downtime,
    /// Pages sent.
    Pages,
}

impl Figure {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::TotalTime, Self::Downtime, Self::Pages];

    /// As a metric's label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::TotalTime => "total_time",
            Self::Downtime => "downtime",
            Self::Pages => "pages",
        }
    }
}

/// One thing that a migration has taught.
#[derive(Debug, Clone, PartialEq)]
pub enum Lesson {
    /// The line between two nodes carried so much.
    Rate {
        /// The node that was left.
        from: String,
        /// The node that was reached.
        to: String,
        /// When, in seconds since 1970.
        at: u64,
        /// How much.
        rate: BytesPerSecond,
    },
    /// A forecast was so far off.
    Error {
        /// How it was made.
        method: Method,
        /// In what.
        figure: Figure,
        /// ln(real / forecast).
        off: f64,
    },
    /// Besides what its last pages took, a guest was stopped for so long: for the hand-over, which the forecast takes as a constant.
    Switchover {
        /// ms.
        ms: f64,
    },
}

impl Lesson {
    /// A figure beside its forecast; `None` where either is nothing that has a logarithm.
    pub fn error(method: Method, figure: Figure, real: f64, forecast: f64) -> Option<Self> {
        let off = (real / forecast).ln();
        (real > 0.0 && forecast > 0.0 && off.is_finite()).then_some(Self::Error { method, figure, off })
    }

    /// What a guest's stop (ms) says of the hand-over, where `assumed` was in its forecast for that. `None`: too much for one, something else
    /// was in the way.
    pub fn switchover(real: f64, forecast: f64, assumed: f64) -> Option<Self> {
        let ms = real - forecast + assumed;
        (ms <= LONGEST_SWITCHOVER).then(|| Self::Switchover { ms: ms.max(0.0) })
    }
}

#[cfg(test)]
mod tests;
