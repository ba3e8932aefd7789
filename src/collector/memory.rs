//! The guest's memory as seen from the host: which pages are there, and what changed since the last read.
//!
//! Reads only. Pages that are not present are never read: on shared memory a read would make them so, and the VM grow.
//! Contents are hashed at once and never kept.

use std::{
    fs::{self, File},
    io::{self, IoSliceMut, Read},
    os::unix::fs::FileExt,
    sync::atomic::{AtomicBool, Ordering},
};

use nix::{
    errno::Errno,
    sys::uio::{RemoteIoVec, process_vm_readv},
    unistd::Pid,
};

use crate::{
    model::units::{Bytes, PAGE},
    qemu::ram::RamBlock,
};

/// Pages read with one call.
const BATCH: usize = 256;
const PAGE_BYTES: usize = 4096;
/// Entries of `/proc/PID/pagemap` read at once.
const PAGEMAP_BATCH: usize = 16 * 1024;
/// More runs of touched pages than memory that is used normally has; each takes 16 bytes of ours.
const MOST_RUNS: usize = 4 << 20;
/// Longer than the kernel's own limit of 65 530 mappings makes `/proc/PID/maps`, bytes.
const LONGEST_MAPS: u64 = 64 << 20;
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;

/// Why memory could not be read.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Not allowed to.
    #[error(
        "not allowed to read the memory of process {pid}: run as root or with CAP_SYS_PTRACE (and check kernel.yama.ptrace_scope), \
         or measure through QEMU with --source dirty-bitmap"
    )]
    Forbidden {
        /// The QEMU process.
        pid: i32,
    },
    /// No such process any more.
    #[error("process {pid} is gone: the VM stopped or moved to another node while it was being looked at")]
    Gone {
        /// The QEMU process.
        pid: i32,
    },
    /// It is not the process that QEMU's monitor spoke of.
    #[error(
        "process {pid} has no such memory as this VM's QEMU describes: it is another VM's, or memory has just been plugged; name \
         the right process with --pid, or measure through QEMU with --source dirty-bitmap"
    )]
    Elsewhere {
        /// The process.
        pid: i32,
    },
    /// Memory in so many pieces that a list of them would be a burden.
    #[error("the memory of process {pid} is in more than {MOST_RUNS} pieces: measure through QEMU with --source dirty-bitmap")]
    Scattered {
        /// The QEMU process.
        pid: i32,
    },
    /// Anything else.
    #[error("cannot read the memory of process {pid}: {source}")]
    Other {
        /// The QEMU process.
        pid: i32,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Memory that has been touched, in runs of pages, ascending: `(first, length)`. What is in neither is zero.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Touched {
    /// In memory.
    pub present: Vec<(u64, u64)>,
    /// Swapped out: holds something, and is not worth fetching to see what.
    pub swapped: Vec<(u64, u64)>,
}

/// What one read said of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint {
    /// A hash of its contents.
    pub hash: u64,
    /// All bytes are zero.
    pub zero: bool,
}

/// The RAM of one QEMU process, numbered in pages from 0 across its blocks.
#[derive(Debug)]
pub struct GuestMemory {
    pid: i32,
    /// `(first page, pages, host address)`.
    blocks: Vec<(u64, u64, u64)>,
    pages: u64,
    buffer: Vec<u8>,
}

impl GuestMemory {
    /// The blocks in QEMU's order, which is the order in which a migration sends them.
    pub fn new(pid: i32, blocks: &[RamBlock]) -> Self {
        let mut pages = 0;
        let blocks = blocks
            .iter()
            .map(|block| {
                let first = pages;
                let length = block.used.0 / PAGE;
                pages += length;
                (first, length, block.host_address)
            })
            .collect();
        Self { pid, blocks, pages, buffer: vec![0; BATCH * PAGE_BYTES] }
    }

    /// Guest RAM.
    pub fn bytes(&self) -> Bytes {
        Bytes(self.pages * PAGE)
    }

    /// Guest RAM in pages.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Makes sure that the process has memory where QEMU says that the guest's is, and that we may look at it: cheap, and no
    /// page is touched. QEMU's addresses are random, so another process does not meet them.
    pub fn check(&self) -> Result<(), MemoryError> {
        let mut maps = String::new();
        let file = File::open(format!("/proc/{}/maps", self.pid)).map_err(|error| self.io(error))?;
        file.take(LONGEST_MAPS).read_to_string(&mut maps).map_err(|error| self.io(error))?;
        let mapped = writable(&maps);
        let held = |&(_, length, address): &(u64, u64, u64)| {
            let end = length.checked_mul(PAGE).and_then(|bytes| address.checked_add(bytes));
            end.is_some_and(|end| mapped.iter().any(|range| range.0 <= address && end <= range.1))
        };
        // A process on its way out keeps its name and has lost its memory.
        if maps.is_empty() {
            return Err(MemoryError::Gone { pid: self.pid });
        }
        if !self.blocks.iter().all(held) {
            return Err(MemoryError::Elsewhere { pid: self.pid });
        }
        self.pagemap().map(drop)
    }

    fn pagemap(&self) -> Result<File, MemoryError> {
        File::open(format!("/proc/{}/pagemap", self.pid)).map_err(|error| self.io(error))
    }

    /// What the guest, or QEMU for it, has touched; `None` when told to stop. Takes about 10 ms for each GiB: call it off the
    /// async threads. Huge pages are told of as the pages that they are made of.
    pub fn touched(&self, stop: &AtomicBool) -> Result<Option<Touched>, MemoryError> {
        self.check()?;
        let map = self.pagemap()?;
        let mut touched = Touched::default();
        let mut buffer = vec![0_u8; PAGEMAP_BATCH * 8];
        for &(first, length, address) in &self.blocks {
            let mut done = 0;
            while done < length {
                if stop.load(Ordering::Relaxed) {
                    return Ok(None);
                }
                if touched.present.len().saturating_add(touched.swapped.len()) > MOST_RUNS {
                    return Err(MemoryError::Scattered { pid: self.pid });
                }
                let count = usize::try_from(length - done).unwrap_or(usize::MAX).min(PAGEMAP_BATCH);
                let Some(entries) = buffer.get_mut(..count * 8) else { break };
                map.read_exact_at(entries, (address / PAGE + done) * 8).map_err(|error| self.io(error))?;
                for (page, entry) in (first + done..).zip(entries.chunks_exact(8)) {
                    let entry = entry.try_into().map_or(0, u64::from_le_bytes);
                    let runs = match entry & (PRESENT | SWAPPED) {
                        0 => continue,
                        SWAPPED => &mut touched.swapped,
                        _ => &mut touched.present,
                    };
                    match runs.last_mut() {
                        Some((start, length)) if *start + *length == page => *length += 1,
                        _ => runs.push((page, 1)),
                    }
                }
                done += count as u64;
            }
        }
        Ok(Some(touched))
    }

    /// How many bytes the process holds in memory, its own included: more than the guest's. Everybody may know.
    pub fn resident(&self) -> Option<Bytes> {
        resident(&fs::read_to_string(format!("/proc/{}/status", self.pid)).ok()?)
    }

    /// Reads the pages and calls `seen` with the index into `pages` and what was read.
    pub fn read(&mut self, pages: &[u64], mut seen: impl FnMut(usize, Fingerprint)) -> Result<(), MemoryError> {
        let Self { pid, blocks, buffer, .. } = self;
        let mut remote = Vec::with_capacity(BATCH);
        for (batch, chosen) in pages.chunks(BATCH).enumerate() {
            remote.clear();
            remote.extend(chosen.iter().filter_map(|&page| {
                let base = usize::try_from(address(blocks, page)?).ok()?;
                Some(RemoteIoVec { base, len: PAGE_BYTES })
            }));
            let wanted = remote.len() * PAGE_BYTES;
            let Some(local) = buffer.get_mut(..wanted) else { continue };
            match process_vm_readv(Pid::from_raw(*pid), &mut [IoSliceMut::new(local)], &remote) {
                Ok(read) if read == wanted => {}
                // A part of the mapping is gone: the process is on its way out.
                Ok(_) => return Err(MemoryError::Gone { pid: *pid }),
                Err(error) => return Err(of(*pid, error.into())),
            }
            for (index, page) in local.chunks_exact(PAGE_BYTES).enumerate() {
                seen(batch * BATCH + index, fingerprint(page));
            }
        }
        Ok(())
    }

    fn io(&self, source: io::Error) -> MemoryError {
        of(self.pid, source)
    }
}

/// The ranges of `/proc/PID/maps` that may be written to, neighbours joined, ascending.
fn writable(maps: &str) -> Vec<(u64, u64)> {
    let mut ranges: Vec<(u64, u64)> = vec![];
    for line in maps.lines() {
        let mut words = line.split_ascii_whitespace();
        let (Some(range), Some(rights)) = (words.next(), words.next()) else { continue };
        let Some((start, end)) = range.split_once('-') else { continue };
        let (Ok(start), Ok(end)) = (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16)) else { continue };
        match ranges.last_mut() {
            _ if !rights.starts_with("rw") => {}
            Some(last) if last.1 == start => last.1 = end,
            _ => ranges.push((start, end)),
        }
    }
    ranges
}

/// Of `/proc/PID/status`: what is nobody's file, what is shared, and what huge pages hold, which the kernel counts apart.
fn resident(status: &str) -> Option<Bytes> {
    let kib = |line: &str| line.split_ascii_whitespace().nth(1)?.parse::<u64>().ok();
    let parts = ["RssAnon:", "RssShmem:", "HugetlbPages:"];
    let counted: Vec<u64> =
        status.lines().filter(|line| parts.iter().any(|part| line.starts_with(part))).filter_map(kib).collect();
    (!counted.is_empty()).then(|| Bytes(counted.iter().fold(0_u64, |sum, kib| sum.saturating_add(*kib)).saturating_mul(1024)))
}

fn address(blocks: &[(u64, u64, u64)], page: u64) -> Option<u64> {
    let &(first, length, address) = blocks.get(blocks.partition_point(|block| block.0 <= page).checked_sub(1)?)?;
    (page - first < length).then_some(address + (page - first) * PAGE)
}

fn of(pid: i32, source: io::Error) -> MemoryError {
    match source.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EPERM | Errno::EACCES) => MemoryError::Forbidden { pid },
        Some(Errno::ESRCH | Errno::ENOENT | Errno::EFAULT) => MemoryError::Gone { pid },
        // The end of a pagemap that has no such address any more.
        _ if source.kind() == io::ErrorKind::UnexpectedEof => MemoryError::Gone { pid },
        _ => MemoryError::Other { pid, source },
    }
}

/// Four independent lanes of multiply and xor: a page in well under a microsecond. Not for adversaries: a guest that
/// wants to hide its writes only harms its own forecast.
fn fingerprint(page: &[u8]) -> Fingerprint {
    const ODD: [u64; 4] = [0x9E37_79B9_7F4A_7C15, 0xC2B2_AE3D_27D4_EB4F, 0x1656_67B1_9E37_79F9, 0xD6E8_FEB8_6659_FD93];
    let mut lanes = [1_u64, 2, 3, 4];
    let mut any = 0;
    for block in page.chunks_exact(32) {
        for ((lane, odd), word) in lanes.iter_mut().zip(ODD).zip(block.chunks_exact(8)) {
            let word = word.try_into().map_or(0, u64::from_le_bytes);
            any |= word;
            *lane = (*lane ^ word).wrapping_mul(odd);
        }
    }
    let [a, b, c, d] = lanes;
    Fingerprint { hash: a ^ (b << 1) ^ (c << 2) ^ (d << 3) ^ (a >> 32) ^ (d >> 29), zero: any == 0 }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn own(memory: &[u8]) -> GuestMemory {
        let block = RamBlock {
            name: "test".into(),
            page_size: Bytes(PAGE),
            used: Bytes(memory.len() as u64),
            total: Bytes(memory.len() as u64),
            host_address: memory.as_ptr().addr() as u64,
            read_only: false,
        };
        GuestMemory::new(i32::try_from(std::process::id()).unwrap(), &[block])
    }

    #[test]
    fn one_flipped_bit_changes_the_hash() {
        let mut page = vec![0_u8; PAGE_BYTES];
        let before = fingerprint(&page);
        assert!(before.zero);
        for at in [0, 7, 8, 31, 2048, 4095] {
            page[at] ^= 1;
            assert_ne!(fingerprint(&page).hash, before.hash, "byte {at}");
            assert!(!fingerprint(&page).zero);
            page[at] ^= 1;
        }
    }

    #[test]
    fn reads_only_what_is_asked_for() {
        let mut memory = vec![0_u8; 600 * PAGE_BYTES];
        memory[5 * PAGE_BYTES] = 1;
        let mut guest = own(&memory);
        let pages: Vec<u64> = (0..600).collect();
        let mut seen = vec![];
        guest.read(&pages, |index, print| seen.push((index, print.zero))).unwrap();
        assert_eq!(seen.len(), 600);
        assert_eq!(seen.iter().filter(|(_, zero)| !zero).map(|(index, _)| *index).collect::<Vec<_>>(), [5]);
    }

    #[test]
    fn knows_what_is_present_without_touching_it() {
        // Aligned to pages by hand: the allocator maps this much afresh, so nothing is present before it is written.
        let mut memory = vec![0_u8; 2000 * PAGE_BYTES];
        let skip = memory.as_ptr().align_offset(PAGE_BYTES);
        let at = skip + 700 * PAGE_BYTES;
        memory[at] = 7;
        let guest = own(&memory[skip..skip + 1999 * PAGE_BYTES]);
        let present = guest.touched(&AtomicBool::new(false)).unwrap().unwrap().present;
        assert_eq!(guest.touched(&AtomicBool::new(true)).unwrap(), None, "told to stop");
        assert!(present.iter().any(|&(first, length)| (first..first + length).contains(&700)), "{present:?}");
        let count: u64 = present.iter().map(|run| run.1).sum();
        assert!(count < 1999, "everything became present by looking");
    }

    #[test]
    fn another_process_is_not_taken_for_the_vms() {
        let memory = vec![1_u8; 4 * PAGE_BYTES];
        own(&memory).check().unwrap();
        let block = |host_address, used| RamBlock {
            name: "x".into(),
            page_size: Bytes(PAGE),
            used: Bytes(used),
            total: Bytes(used),
            host_address,
            read_only: false,
        };
        let pid = i32::try_from(std::process::id()).unwrap();
        // Nowhere; our own program, which nobody may write; memory that begins here and has no end.
        for (address, used) in [
            (PAGE, PAGE),
            (another_process_is_not_taken_for_the_vms as fn() as usize as u64 & !(PAGE - 1), PAGE),
            (memory.as_ptr().addr() as u64, 1 << 47),
            (u64::MAX - PAGE + 1, 2 * PAGE),
        ] {
            let guest = GuestMemory::new(pid, &[block(address, used)]);
            assert!(matches!(guest.check(), Err(MemoryError::Elsewhere { .. })), "{address:x}");
            assert!(guest.touched(&AtomicBool::new(false)).is_err());
        }
    }

    #[test]
    fn everything_that_is_held_is_counted() {
        let status = "Name:\tqemu\nVmRSS:\t   700 kB\nRssAnon:\t     10 kB\nRssFile:\t     99 kB\nRssShmem:\t    20 kB\nHugetlbPages:\t    2048 kB\n";
        assert_eq!(resident(status), Some(Bytes(2078 * 1024)));
        assert_eq!(resident("Name: x"), None);
        assert!(own(&[]).resident().unwrap().0 > 1 << 20);
    }

    #[test]
    fn a_process_that_is_gone_is_said_to_be_gone() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        child.wait().unwrap();
        let block = RamBlock {
            name: "x".into(),
            page_size: Bytes(PAGE),
            used: Bytes(PAGE),
            total: Bytes(PAGE),
            host_address: PAGE,
            read_only: false,
        };
        let mut guest = GuestMemory::new(pid, &[block]);
        assert!(matches!(guest.read(&[0], |_, _| ()), Err(MemoryError::Gone { .. })));
        assert!(matches!(guest.touched(&AtomicBool::new(false)), Err(MemoryError::Gone { .. })));
    }
}
