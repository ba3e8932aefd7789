//! The settings that accuracy is tested under, in short.

use std::time::Duration;

use migvisor::model::units::BytesPerSecond;

use super::Settings;

/// One setting of a guest's migration.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Under {
    /// A cap in MiB/s, and a downtime limit in ms.
    Cap(u64, u64),
    /// No cap, over a line of so many MiB/s, with QEMU's downtime limit.
    Link(u64),
}

impl Under {
    /// In full, with this budget of time.
    pub fn settings(self, time_budget: Duration) -> Settings {
        match self {
            Self::Cap(mib, limit) => {
                Settings { downtime_limit: Duration::from_millis(limit), time_budget, ..Settings::capped(mib) }
            }
            Self::Link(mib) => Settings { link: Some(BytesPerSecond(mib << 20)), time_budget, ..Settings::uncapped() },
        }
    }
}
