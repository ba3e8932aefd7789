//! The machine's own memory: what the kernel tells of it, and huge pages while they are needed.

use std::fs;

use anyhow::{Context, Result};

use crate::skip;

const RESERVED: &str = "/proc/sys/vm/nr_hugepages";

/// A field of a `/proc` file, in KiB (or pages, as the field has it).
pub fn kib(path: &str, field: &str) -> Result<u64> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
    let line = text.lines().find(|line| line.starts_with(field)).with_context(|| format!("no {field} in {path}"))?;
    let number = line.split_ascii_whitespace().nth(1).with_context(|| format!("{line} has no number"))?;
    number.parse().with_context(|| format!("{line} has no number"))
}

/// Huge pages of 2 MiB, reserved while this lives.
#[derive(Debug)]
pub struct HugePages {
    before: String,
}

impl HugePages {
    /// So many more than there are. `None`, and noted as skipped, where the machine has none to give.
    pub fn reserve(count: u64) -> Result<Option<Self>> {
        let before = fs::read_to_string(RESERVED).with_context(|| format!("cannot read {RESERVED}"))?;
        let pages = Self { before };
        let wanted = pages.before.trim().parse::<u64>()?.saturating_add(count);
        if fs::write(RESERVED, wanted.to_string()).is_ok() && kib("/proc/meminfo", "HugePages_Free:")? >= count {
            return Ok(Some(pages));
        }
        skip::note("memory on huge pages: this machine reserves none of 2 MiB");
        Ok(None)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(RESERVED, &self.before);
    }
}
