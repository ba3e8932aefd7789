//! QEMU's settings on disk while they are borrowed: what puts them back after our own death. In: a folder, a process. Out: the settings that
//! a run before us could not put back.
//!
//! One small file per QEMU, named after the process and the time of its start, so that no other QEMU is ever given these settings.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

use super::{DryRunError, settings::Loan};

/// Nothing that QEMU tells of itself is longer.
const LONGEST: u64 = 1 << 20;

/// Where the settings of one QEMU are kept.
#[derive(Debug)]
pub(super) struct Journal {
    file: PathBuf,
}

impl Journal {
    /// The place for this process; `None` where the kernel does not tell when it was started.
    pub(super) fn of(folder: &Path, pid: i32) -> Option<Self> {
        Self::at(Path::new("/proc"), folder, pid)
    }

    fn at(proc: &Path, folder: &Path, pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(proc.join(pid.to_string()).join("stat")).ok()?;
        // Field 22, the start in clock ticks since boot; the name, the second field, ends with the last parenthesis.
        let started: u64 = stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()?;
        Some(Self { file: folder.join(format!("dry-run-{pid}-{started}.json")) })
    }

    /// What a run before us left behind. What cannot be read is put aside: it helps nobody.
    pub(super) fn left_behind(&self) -> Option<Loan> {
        let known = fs::metadata(&self.file).ok()?;
        let loan = if known.len() > LONGEST {
            None
        } else {
            fs::read(&self.file).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok())
        };
        if loan.is_none() {
            tracing::warn!(file = %self.file.display(), "settings left by an earlier dry run cannot be read; put aside");
            let mut aside = self.file.clone().into_os_string();
            aside.push(".unreadable");
            let _ = fs::rename(&self.file, aside);
        }
        loan
    }

    /// Keeps them: whole or not at all, and on disk before anything is touched.
    pub(super) fn keep(&self, loan: &Loan) -> Result<(), DryRunError> {
        let error = |source| DryRunError::Journal { path: self.file.clone(), source };
        let partial = self.file.with_extension("partial");
        let write = || -> io::Result<()> {
            fs::create_dir_all(self.file.parent().unwrap_or(Path::new(".")))?;
            let mut file = fs::File::create(&partial)?;
            file.write_all(&serde_json::to_vec(loan)?)?;
            file.sync_all()?;
            fs::rename(&partial, &self.file)
        };
        write().map_err(|source| {
            let _ = fs::remove_file(&partial);
            error(source)
        })
    }

    /// They are back where they belong.
    pub(super) fn forget(&self) {
        if let Err(error) = fs::remove_file(&self.file)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(file = %self.file.display(), %error, "cannot remove; the next dry run puts the same settings back once more");
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::json;

    use super::*;

    fn process(start: &str) -> tempfile::TempDir {
        let proc = tempfile::tempdir().unwrap();
        fs::create_dir(proc.path().join("7")).unwrap();
        fs::write(proc.path().join("7/stat"), format!("7 (a) b) S {} {start} 0", ["0"; 18].join(" "))).unwrap();
        proc
    }

    fn loan() -> Loan {
        let settings = json!({"capabilities": {"events": false}, "parameters": {"x": 1}});
        serde_json::from_value(json!({"before": settings, "during": settings, "limits_ms": [300]})).unwrap()
    }

    #[test]
    fn what_was_kept_is_found_by_the_same_process_only() {
        let (proc, other) = (process("123"), process("124"));
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("not/yet");
        let journal = Journal::at(proc.path(), &deep, 7).unwrap();
        let loan = loan();
        assert_eq!(journal.left_behind(), None);
        journal.keep(&loan).unwrap();
        assert_eq!(journal.left_behind().as_ref(), Some(&loan));
        assert_eq!(Journal::at(other.path(), &deep, 7).unwrap().left_behind(), None);
        journal.forget();
        assert_eq!((journal.left_behind(), fs::read_dir(&deep).unwrap().count()), (None, 0));
        assert!(Journal::at(proc.path(), &deep, 8).is_none());
    }

    #[test]
    fn half_a_journal_is_put_aside() {
        let (proc, folder) = (process("123"), tempfile::tempdir().unwrap());
        let journal = Journal::at(proc.path(), folder.path(), 7).unwrap();
        fs::write(&journal.file, "{\"capabilities\": {").unwrap();
        assert_eq!(journal.left_behind(), None);
        assert!(!journal.file.exists() && folder.path().join("dry-run-7-123.json.unreadable").exists());
        // No room, or no right: said before anything is touched.
        let nowhere = Journal::at(proc.path(), Path::new("/proc/none"), 7).unwrap();
        let error = nowhere.keep(&loan()).unwrap_err();
        assert!(matches!(error, DryRunError::Journal { .. }), "{error}");
    }
}
