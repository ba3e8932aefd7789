//! What QEMU says unasked. Pure.

use serde::Deserialize;
use serde_json::Value;

/// Something that QEMU said unasked.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Event {
    /// Its name, such as `MIGRATION_PASS`.
    #[serde(rename = "event")]
    pub name: String,
    /// What belongs to it.
    #[serde(default)]
    pub data: Value,
    /// When QEMU said it.
    #[serde(default)]
    pub timestamp: Timestamp,
}

/// QEMU's wall clock.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Timestamp {
    seconds: i64,
    microseconds: i64,
}

impl Timestamp {
    /// Milliseconds since 1970; `None` where QEMU could not read its clock.
    pub fn ms(self) -> Option<f64> {
        (self.seconds > 0 && self.microseconds >= 0).then(|| self.seconds as f64 * 1e3 + self.microseconds as f64 / 1e3)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn times_are_read_and_their_absence_is_no_error() {
        let event = |text: &str| serde_json::from_str::<Event>(text).unwrap();
        let pass = event(
            r#"{"event": "MIGRATION_PASS", "data": {"pass": 2}, "timestamp": {"seconds": 1267061043, "microseconds": 959568}}"#,
        );
        assert_eq!((pass.name.as_str(), pass.timestamp.ms()), ("MIGRATION_PASS", Some(1_267_061_043_959.568)));
        // QEMU writes -1 where it cannot read its clock.
        assert_eq!(event(r#"{"event": "STOP", "timestamp": {"seconds": -1, "microseconds": -1}}"#).timestamp.ms(), None);
        assert_eq!(event(r#"{"event": "STOP"}"#).timestamp.ms(), None);
    }
}
