//! Quantities with their units: bytes and bytes per second, read and written the way Kubernetes does (`100Mi`, `1Gi`).

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// The page of the guest and of QEMU's migration stream, in bytes.
pub const PAGE: u64 = 4096;

/// Below this a bandwidth is a slip of the pen: 64 KiB/s.
pub const SLOWEST: BytesPerSecond = BytesPerSecond(64 << 10);
/// Above this no line exists: 8 Tbit/s.
pub const FASTEST: BytesPerSecond = BytesPerSecond(1 << 40);

/// A number of bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Bytes(pub u64);

/// Thousandths of a processor, as Kubernetes counts (`1500m`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MilliCpus(pub u64);

/// A rate in bytes per second. Where a limit is meant, see [`Bandwidth`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BytesPerSecond(pub u64);

/// QEMU's `max-bandwidth`: a cap, or none (KubeVirt's default, written `0` or `unlimited`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Bandwidth {
    /// No cap: the line decides.
    Unlimited,
    /// At most this much.
    Capped(BytesPerSecond),
}

/// Why a text is no quantity.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
#[error("`{text}` is not {what}: {hint}")]
pub struct ParseQuantityError {
    text: String,
    what: &'static str,
    hint: &'static str,
}

const SUFFIXES: [(&str, f64); 13] = [
    ("Ki", 1024.0),
    ("Mi", 1_048_576.0),
    ("Gi", 1_073_741_824.0),
    ("Ti", 1_099_511_627_776.0),
    ("Pi", 1_125_899_906_842_624.0),
    ("Ei", 1_152_921_504_606_846_976.0),
    ("m", 1e-3),
    ("k", 1e3),
    ("M", 1e6),
    ("G", 1e9),
    ("T", 1e12),
    ("P", 1e15),
    ("E", 1e18),
];

/// Reads a Kubernetes quantity as a whole number, rounded up as Kubernetes' `Value()` does.
fn parse_quantity(text: &str, what: &'static str) -> Result<u64, ParseQuantityError> {
    parse_scaled(text, 1.0, what)
}

/// The same, in units of which `scale` make one.
fn parse_scaled(text: &str, scale: f64, what: &'static str) -> Result<u64, ParseQuantityError> {
    let error = |hint| ParseQuantityError { text: text.to_owned(), what, hint };
    let trimmed = text.trim();
    // A plain number first: `1e3` and `1E3` are exponents, not exa.
    let (number, factor) = match trimmed.parse::<f64>() {
        Ok(number) => (number, 1.0),
        Err(_) => SUFFIXES
            .iter()
            .find_map(|(suffix, factor)| trimmed.strip_suffix(suffix).map(|n| (n, *factor)))
            .and_then(|(n, factor)| n.parse::<f64>().ok().map(|n| (n, factor)))
            .ok_or_else(|| error("write a number, with a suffix where it needs one, such as 100Mi or 1Gi"))?,
    };
    let value = (number * factor * scale).ceil();
    if !value.is_finite() || number.is_sign_negative() && number != 0.0 {
        return Err(error("it has to be finite and not negative"));
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked on the next line")]
    let whole = value as u64;
    if value >= 9.2e18 { Err(error("it is too large")) } else { Ok(whole) }
}

/// `100Mi` where that is exact, else plain bytes: what Kubernetes reads back to the same number.
fn write_quantity(f: &mut fmt::Formatter<'_>, bytes: u64) -> fmt::Result {
    for (shift, suffix) in [(40, "Ti"), (30, "Gi"), (20, "Mi"), (10, "Ki")] {
        let unit = 1_u64 << shift;
        if bytes >= unit && bytes.is_multiple_of(unit) {
            return write!(f, "{}{suffix}", bytes / unit);
        }
    }
    write!(f, "{bytes}")
}

/// `97.3 MiB`: for people, not to be read back.
fn human(bytes: f64) -> String {
    for (unit, suffix) in [(1_099_511_627_776.0, "TiB"), (1_073_741_824.0, "GiB"), (1_048_576.0, "MiB"), (1024.0, "KiB")] {
        if bytes >= unit {
            let value = bytes / unit;
            return if value >= 100.0 { format!("{value:.0} {suffix}") } else { format!("{value:.1} {suffix}") };
        }
    }
    format!("{bytes:.0} B")
}

impl Bytes {
    /// So many pages of 4 KiB, the last one rounded up.
    pub fn pages(self) -> u64 {
        self.0.div_ceil(PAGE)
    }

    /// `97.3 MiB`: for people.
    pub fn human(self) -> String {
        human(self.0 as f64)
    }
}

impl MilliCpus {
    /// `1 processor`, `1.5 processors`: for people.
    pub fn human(self) -> String {
        let unit = if self.0 == 1000 { "processor" } else { "processors" };
        format!("{} {unit}", self.0 as f64 / 1000.0)
    }
}

impl BytesPerSecond {
    /// `97.3 MiB/s`: for people.
    pub fn human(self) -> String {
        format!("{}/s", human(self.0 as f64))
    }

    /// The rate in bytes per millisecond, the unit of the replay.
    pub fn per_ms(self) -> f64 {
        self.0 as f64 / 1000.0
    }
}

impl Bandwidth {
    /// The cap, if there is one.
    pub fn cap(self) -> Option<BytesPerSecond> {
        match self {
            Self::Unlimited => None,
            Self::Capped(rate) => Some(rate),
        }
    }

    /// `100 MiB/s` or `no cap`: for people.
    pub fn human(self) -> String {
        self.cap().map_or_else(|| "no cap".to_owned(), BytesPerSecond::human)
    }
}

impl From<BytesPerSecond> for Bandwidth {
    /// QEMU's and KubeVirt's convention: 0 is no cap.
    fn from(rate: BytesPerSecond) -> Self {
        if rate.0 == 0 { Self::Unlimited } else { Self::Capped(rate) }
    }
}

impl FromStr for Bytes {
    type Err = ParseQuantityError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse_quantity(text, "a size in bytes").map(Self)
    }
}

impl FromStr for BytesPerSecond {
    type Err = ParseQuantityError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse_quantity(text, "a rate in bytes per second").map(Self)
    }
}

impl FromStr for Bandwidth {
    type Err = ParseQuantityError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.trim().eq_ignore_ascii_case("unlimited") {
            return Ok(Self::Unlimited);
        }
        parse_quantity(text, "a bandwidth in bytes per second").map(|rate| BytesPerSecond(rate).into())
    }
}

impl FromStr for MilliCpus {
    type Err = ParseQuantityError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse_scaled(text, 1000.0, "a number of processors").map(Self)
    }
}

impl fmt::Display for MilliCpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_multiple_of(1000) { write!(f, "{}", self.0 / 1000) } else { write!(f, "{}m", self.0) }
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_quantity(f, self.0)
    }
}

impl fmt::Display for BytesPerSecond {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_quantity(f, self.0)
    }
}

impl fmt::Display for Bandwidth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unlimited => f.write_str("unlimited"),
            Self::Capped(rate) => rate.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_kubernetes_writes() {
        for (text, bytes) in
            [("100Mi", 104_857_600), ("1Gi", 1 << 30), ("0", 0), ("1500m", 2), ("1e3", 1000), ("64M", 64_000_000), (" 7 ", 7)]
        {
            assert_eq!(text.parse::<BytesPerSecond>(), Ok(BytesPerSecond(bytes)), "{text}");
        }
    }

    #[test]
    #[allow(clippy::unwrap_used)]
    fn refuses_nonsense_with_a_way_out() {
        for text in ["", "Mi", "-1Mi", "NaN", "inf", "1e30", "10 parsecs", "0x10"] {
            let error = text.parse::<Bandwidth>().unwrap_err().to_string();
            assert!(error.contains("is not a bandwidth"), "{text}: {error}");
        }
    }

    #[test]
    fn processors_are_thousandths() {
        for (text, milli, written) in
            [("4", 4000, "4"), ("1500m", 1500, "1500m"), ("0.1", 100, "100m"), ("0", 0, "0"), ("2k", 2_000_000, "2000")]
        {
            assert_eq!(text.parse(), Ok(MilliCpus(milli)), "{text}");
            assert_eq!(MilliCpus(milli).to_string(), written);
        }
        assert!("many".parse::<MilliCpus>().is_err());
        for (milli, words) in [(1000, "1 processor"), (0, "0 processors"), (1500, "1.5 processors")] {
            assert_eq!(MilliCpus(milli).human(), words);
        }
    }

    #[test]
    fn zero_is_no_cap() {
        assert_eq!("0".parse(), Ok(Bandwidth::Unlimited));
        assert_eq!("unlimited".parse(), Ok(Bandwidth::Unlimited));
        assert_eq!("1Mi".parse(), Ok(Bandwidth::Capped(BytesPerSecond(1 << 20))));
    }

    #[test]
    fn what_is_written_reads_back_the_same() {
        for bytes in [0, 1, 1023, 1024, 5 << 20, (5 << 20) + 1, 3 << 40] {
            assert_eq!(Bytes(bytes).to_string().parse(), Ok(Bytes(bytes)));
        }
    }
}
