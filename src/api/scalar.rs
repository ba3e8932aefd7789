//! Quantities (`100Mi`) and durations (`1.83s`) as Kubernetes writes them.
//!
//! They read any text without panicking (`kube`'s own duration panics on `99999999999999999999h`, and one such object
//! would take every watcher down) and keep what they cannot use for the conversion to complain about, with the field's name.

use std::{fmt, str::FromStr, time};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Number, Value};

use crate::model::units::{Bandwidth, Bytes, BytesPerSecond, MilliCpus, ParseQuantityError};

/// A Kubernetes quantity: `100Mi`, `1Gi`, `5`. Kept as written; the conversions judge it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Quantity(pub String);

impl Quantity {
    /// As a size.
    ///
    /// # Errors
    /// It is no quantity, negative, or too large.
    pub fn bytes(&self) -> Result<Bytes, ParseQuantityError> {
        self.0.parse()
    }

    /// As a rate per second.
    ///
    /// # Errors
    /// It is no quantity, negative, or too large.
    pub fn rate(&self) -> Result<BytesPerSecond, ParseQuantityError> {
        self.0.parse()
    }

    /// As processors.
    ///
    /// # Errors
    /// It is no quantity, negative, or too large.
    pub fn processors(&self) -> Result<MilliCpus, ParseQuantityError> {
        self.0.parse()
    }

    /// As a cap; 0 is none.
    ///
    /// # Errors
    /// It is no quantity, negative, or too large.
    pub fn bandwidth(&self) -> Result<Bandwidth, ParseQuantityError> {
        self.0.parse()
    }
}

impl From<Bytes> for Quantity {
    fn from(bytes: Bytes) -> Self {
        Self(bytes.to_string())
    }
}

impl From<BytesPerSecond> for Quantity {
    fn from(rate: BytesPerSecond) -> Self {
        Self(rate.to_string())
    }
}

impl From<MilliCpus> for Quantity {
    fn from(cpus: MilliCpus) -> Self {
        Self(cpus.to_string())
    }
}

impl From<Bandwidth> for Quantity {
    /// No cap is written `0`, as in KubeVirt.
    fn from(bandwidth: Bandwidth) -> Self {
        bandwidth.cap().map_or_else(|| Self("0".to_owned()), Self::from)
    }
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Quantity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum TextOrNumber {
            Text(String),
            Number(Number),
        }
        Ok(match TextOrNumber::deserialize(deserializer)? {
            TextOrNumber::Text(text) => Self(text),
            TextOrNumber::Number(number) => Self(number.to_string()),
        })
    }
}

impl JsonSchema for Quantity {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Quantity".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "x-kubernetes-int-or-string": true })
    }
}

/// A length of time, never negative, in Go's notation: `300ms`, `1.83s`, `45m0s`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Duration(pub time::Duration);

/// Why a text is no duration.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("`{0}` is not a duration: write a number with a unit, such as 300ms, 1.5s or 10m")]
pub struct ParseDurationError(String);

impl Duration {
    /// The longest that is written, 300 years: what Go's durations can hold.
    pub const LONGEST: Self = Self(time::Duration::from_secs(9_200_000_000));

    /// From a number of milliseconds; what is no length of time (negative, not a number) becomes 0, what is too long the longest.
    pub fn from_ms(ms: f64) -> Self {
        // More digits than our figures resolve would only change for change's sake: tenths of a millisecond below a second, else whole ones.
        let ms = ms.max(0.0);
        let seconds = if ms < 1000.0 { (ms * 10.0).round() / 10_000.0 } else { ms.round() / 1000.0 };
        time::Duration::try_from_secs_f64(seconds).map_or(Self::LONGEST, |duration| Self(duration).min(Self::LONGEST))
    }

    /// In milliseconds.
    pub fn as_ms(self) -> f64 {
        self.0.as_secs_f64() * 1000.0
    }

    /// `212 ms`, `3.7 s`, `12 min 30 s`: for people, not to be read back.
    pub fn human(self) -> String {
        let ms = self.as_ms();
        if ms < 999.5 {
            return format!("{ms:.0} ms");
        }
        if ms < 99_950.0 {
            return format!("{} s", (ms / 100.0).round() / 10.0);
        }
        let seconds = (ms / 1000.0).round();
        let (minutes, rest) = ((seconds / 60.0).floor(), seconds % 60.0);
        if rest == 0.0 { format!("{minutes:.0} min") } else { format!("{minutes:.0} min {rest:.0} s") }
    }
}

impl From<time::Duration> for Duration {
    fn from(duration: time::Duration) -> Self {
        Self(duration)
    }
}

impl From<Duration> for time::Duration {
    fn from(duration: Duration) -> Self {
        duration.0
    }
}

impl fmt::Display for Duration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl FromStr for Duration {
    type Err = ParseDurationError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseDurationError(text.chars().take(40).collect());
        let mut rest = text.trim();
        let mut total = time::Duration::ZERO;
        if rest == "0" {
            return Ok(Self(total));
        }
        if rest.is_empty() {
            return Err(error());
        }
        while !rest.is_empty() {
            let unit_at = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(error)?;
            let (number, tail) = rest.split_at(unit_at);
            let unit_end = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
            let (unit, tail) = tail.split_at(unit_end);
            let scale = match unit {
                "ns" => 1e-9,
                "us" | "\u{b5}s" | "\u{3bc}s" => 1e-6,
                "ms" => 1e-3,
                "s" => 1.0,
                "m" => 60.0,
                "h" => 3600.0,
                _ => return Err(error()),
            };
            let number: f64 = number.parse().map_err(|_| error())?;
            let part = time::Duration::try_from_secs_f64(number * scale).map_err(|_| error())?;
            total = total.checked_add(part).ok_or_else(error)?;
            rest = tail;
        }
        Ok(Self(total))
    }
}

impl Serialize for Duration {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Duration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for Duration {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Duration".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        // So long a number of hours still fits: whoever passes this pattern is read.
        json_schema!({ "type": "string", "pattern": r"^(0|([0-9]{1,10}(\.[0-9]{1,9})?(ns|us|µs|ms|s|m|h))+)$", "maxLength": 64 })
    }
}

/// Reads a number that may be written as a number or as text (KubeVirt changes its mind between versions); anything else is `None`.
pub fn lenient_u64<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    Ok(match Option::<Value>::deserialize(deserializer)? {
        Some(Value::Number(number)) => number.as_u64(),
        Some(Value::String(text)) => text.trim().parse().ok(),
        _ => None,
    })
}

/// Reads a field if it has the shape that we know; otherwise it counts as absent.
pub fn lenient<'de, D: Deserializer<'de>, T: serde::de::DeserializeOwned + Default>(deserializer: D) -> Result<T, D::Error> {
    Ok(Option::<Value>::deserialize(deserializer)?.and_then(|value| serde_json::from_value(value).ok()).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn durations_of_go() {
        for (text, ms) in [
            ("300ms", 300.0),
            ("1.83s", 1830.0),
            ("45m0s", 2_700_000.0),
            ("1h1m1s", 3_661_000.0),
            ("0", 0.0),
            ("5us", 0.005),
            ("5µs", 0.005),
        ] {
            assert!((text.parse::<Duration>().unwrap().as_ms() - ms).abs() < 1e-6, "{text}");
        }
        for text in [
            "",
            "5",
            "-5s",
            "5s-3s",
            "s",
            "1e9s",
            "99999999999999999999999h",
            "1.2.3s",
            "∞",
            "5 parsecs",
            "18446744073709551615s18446744073709551615s",
        ] {
            assert!(text.parse::<Duration>().unwrap_err().to_string().contains("such as 300ms"), "{text}");
        }
    }

    #[test]
    fn durations_are_written_short() {
        for (ms, text) in
            [(1830.0, "1.83s"), (300.04, "300ms"), (212.46, "212.5ms"), (2_700_000.0, "2700s"), (-1.0, "0ns"), (f64::NAN, "0ns")]
        {
            assert_eq!(Duration::from_ms(ms).to_string(), text);
        }
    }

    #[test]
    fn durations_for_people() {
        for (ms, text) in [
            (212.4, "212 ms"),
            (3720.0, "3.7 s"),
            (20_000.0, "20 s"),
            (600_000.0, "10 min"),
            (750_000.0, "12 min 30 s"),
            (99_960.0, "1 min 40 s"),
        ] {
            assert_eq!(Duration::from_ms(ms).human(), text);
        }
    }

    #[test]
    fn quantities_are_text_or_numbers() {
        for (json, bytes) in [("\"100Mi\"", 100 << 20), ("5", 5), ("\"0\"", 0)] {
            assert_eq!(serde_json::from_str::<Quantity>(json).unwrap().bytes(), Ok(Bytes(bytes)));
        }
        assert_eq!(Quantity::from(Bandwidth::Unlimited).0, "0");
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".{0,40}", number in "[0-9.]{0,30}", unit in "(h|m|s|ms|)") {
            let _ = text.parse::<Duration>();
            let _ = format!("{number}{unit}{number}{unit}").parse::<Duration>();
            let _ = Quantity(text).bytes();
        }

        #[test]
        fn durations_read_back(ms in 0.0..1e12_f64) {
            let duration = Duration::from_ms(ms);
            let back: Duration = duration.to_string().parse().unwrap();
            prop_assert!((back.as_ms() - duration.as_ms()).abs() <= 1e-9 * ms + 1e-3);
        }
    }
}
