//! The paced guest: what it writes, and how it comes to be. In: a pattern and its figures. Out: an ELF file that QEMU boots
//! (built once by gcc and ld into the user's cache, shared by every clone) and its command line.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

const SOURCES: [(&str, &str); 3] = [
    ("start.S", include_str!("guest/start.S")),
    ("guest.c", include_str!("guest/guest.c")),
    ("link.ld", include_str!("guest/link.ld")),
];
const CFLAGS: [&str; 14] = [
    "-m32",
    "-march=i686",
    "-O2",
    "-std=gnu11",
    "-ffreestanding",
    "-nostdlib",
    "-fno-pic",
    "-fno-pie",
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables",
    "-fcf-protection=none",
    "-Wall",
    "-Wextra",
    "-Wno-main",
];

/// How the guest chooses the pages that it writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Writes {
    /// It writes nothing.
    Idle,
    /// Each write to a random page.
    Uniform,
    /// Each write to the next page, round and round.
    Sequential,
    /// `hot_share` of the writes to one of the first `hot_pages`, the rest to a random page of all.
    Hot,
    /// As uniform for `phase_ms`, then nothing for as long.
    Phased,
}

impl Writes {
    fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Uniform => "uniform",
            Self::Sequential => "sequential",
            Self::Hot => "hot",
            Self::Phased => "phased",
        }
    }
}

/// What a guest does. Its `pages` hold data from the start, whether it writes them or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestSpec {
    /// How it chooses.
    pub writes: Writes,
    /// Data pages of 4 KiB.
    pub pages: u32,
    /// Writes per millisecond.
    pub writes_per_ms: u32,
    /// The hot ones of them, from the first on.
    pub hot_pages: u32,
    /// Percent of the writes that go to the hot ones.
    pub hot_share: u32,
    /// Page index of the first data page.
    pub base: u32,
    /// Length of a phase, ms.
    pub phase_ms: u32,
    /// Seed of its random numbers.
    pub seed: u32,
    /// It never halts, and does not make up for what it missed while its CPU was taken away.
    pub computing: bool,
}

/// Where data begins: 32 MiB, out of the firmware's way.
pub const DATA_BASE: u32 = 8192;

impl GuestSpec {
    /// A guest that boots and halts.
    pub const fn idle() -> Self {
        Self::of(Writes::Idle, 0, 0)
    }

    /// A guest with data that it never writes again.
    pub const fn still(pages: u32) -> Self {
        Self::of(Writes::Idle, pages, 0)
    }

    /// Random writes over all pages.
    pub const fn uniform(pages: u32, writes_per_ms: u32) -> Self {
        Self::of(Writes::Uniform, pages, writes_per_ms)
    }

    /// Page after page.
    pub const fn sequential(pages: u32, writes_per_ms: u32) -> Self {
        Self::of(Writes::Sequential, pages, writes_per_ms)
    }

    /// `hot_share` percent of the writes to the first `hot_pages`.
    pub const fn hot(pages: u32, writes_per_ms: u32, hot_pages: u32, hot_share: u32) -> Self {
        Self { hot_pages, hot_share, ..Self::of(Writes::Hot, pages, writes_per_ms) }
    }

    /// Random writes for `phase_ms`, calm for as long.
    pub const fn phased(pages: u32, writes_per_ms: u32, phase_ms: u32) -> Self {
        Self { phase_ms, ..Self::of(Writes::Phased, pages, writes_per_ms) }
    }

    const fn of(writes: Writes, pages: u32, writes_per_ms: u32) -> Self {
        let (hot_pages, hot_share, phase_ms, seed) = (0, 0, 1000, 1);
        Self { writes, pages, writes_per_ms, hot_pages, hot_share, base: DATA_BASE, phase_ms, seed, computing: false }
    }

    /// As fast as its CPU lets it be, as guests are that compute. Others, that answer requests, make up for a slow moment.
    #[must_use]
    pub const fn computing(self) -> Self {
        Self { computing: true, ..self }
    }

    /// What it is told at boot.
    pub fn command_line(&self) -> String {
        let Self { writes, pages, writes_per_ms, hot_pages, hot_share, base, phase_ms, seed, computing } = self;
        format!(
            "pattern={} pages={pages} writes={writes_per_ms} hot_pages={hot_pages} hot_share={hot_share} base={base} \
             phase_ms={phase_ms} seed={seed} computing={}",
            writes.name(),
            u8::from(*computing)
        )
    }

    /// Does it fit into so much memory, and does it make sense?
    pub(super) fn check(&self, memory_mib: u32) -> Result<()> {
        let end = u64::from(self.base) + u64::from(self.pages);
        ensure!(
            self.base > 4096,
            "the data, and the page before it, must lie above 16 MiB, where the firmware leaves them alone"
        );
        ensure!(end <= u64::from(memory_mib) << 8, "{end} pages do not fit into {memory_mib} MiB");
        ensure!(self.hot_share <= 100 && self.hot_pages <= self.pages, "the hot pages are a part of all pages");
        ensure!(self.writes != Writes::Hot || self.hot_share == 0 || self.hot_pages > 0, "a hot guest needs hot_pages");
        // The generator chooses a byte among pages × 4096 < 2^32.
        ensure!(self.pages < 1 << 20, "a 32-bit guest has less than 2^20 pages");
        Ok(())
    }

    /// The closed form f(t) of a uniform guest: distinct pages written within so many milliseconds.
    pub fn uniform_curve(&self, ms: f64) -> f64 {
        let pages = f64::from(self.pages);
        pages * (1.0 - (1.0 - 1.0 / pages).powf(f64::from(self.writes_per_ms) * ms))
    }
}

/// The guest's ELF file; built where it is not in the cache yet.
pub fn program() -> Result<PathBuf> {
    let mut key = DefaultHasher::new();
    (SOURCES, CFLAGS).hash(&mut key);
    let cache = cache_dir()?.join("guest");
    let finished = cache.join(format!("{:016x}.elf", key.finish()));
    if finished.is_file() {
        return Ok(finished);
    }
    std::fs::create_dir_all(&cache).with_context(|| format!("creating {}", cache.display()))?;
    let building = tempfile::tempdir_in(&cache)?;
    build(building.path()).context("building the laboratory's guest")?;
    // Several tests may build at once: whoever renames last wins, with the same bytes.
    std::fs::rename(building.path().join("guest.elf"), &finished)?;
    Ok(finished)
}

fn cache_dir() -> Result<PathBuf> {
    let base = match (std::env::var_os("XDG_CACHE_HOME"), std::env::var_os("HOME")) {
        (Some(cache), _) if !cache.is_empty() => PathBuf::from(cache),
        (_, Some(home)) => PathBuf::from(home).join(".cache"),
        _ => bail!("neither XDG_CACHE_HOME nor HOME is set: cannot tell where to cache the guest"),
    };
    Ok(base.join("migvisor"))
}

fn build(dir: &Path) -> Result<()> {
    for (name, text) in SOURCES {
        std::fs::write(dir.join(name), text)?;
    }
    run(Command::new("gcc").args(CFLAGS).args(["-c", "guest.c", "-o", "guest.o"]).current_dir(dir))?;
    run(Command::new("gcc").args(["-m32", "-c", "start.S", "-o", "start.o"]).current_dir(dir))?;
    let link = ["-m", "elf_i386", "-T", "link.ld", "-o", "guest.elf", "start.o", "guest.o"];
    run(Command::new("ld").args(link).current_dir(dir))
}

fn run(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("starting {name}: install gcc and binutils (make setup does)"))?;
    ensure!(output.status.success(), "{name} failed:\n{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
