//! Patterns on disk, so that a restart of the agent forgets nothing: one file a VM, named by pod UID, with its last few patterns.
//!
//! In: a directory, patterns as they are made. Out: after a restart, what was known. Bounded in epochs a VM and in bytes altogether. Nothing
//! depends on it: what cannot be written is said and left, what cannot be read is set aside and said. Blocks: call it off the async threads.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use k8s_openapi::jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::locate::is_plain_uid;
use crate::model::pattern::{Pattern, Recorded};

/// Patterns kept of each VM: the newest, and what it did before.
pub const EPOCHS: usize = 3;
/// All files together.
const MOST_BYTES: u64 = 64 << 20;
/// The layout of a file. Another one is set aside like any other file that cannot be read.
const VERSION: u32 = 1;
const SUFFIX: &str = "json";

/// One look at a VM.
#[derive(Debug, Clone, PartialEq)]
pub struct Epoch {
    /// When the look ended.
    pub measured_at: Timestamp,
    /// Who wrote which page when.
    pub pattern: Arc<Pattern>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct File {
    version: u32,
    #[serde(rename = "podUID")]
    pod_uid: String,
    /// Oldest first.
    epochs: Vec<EpochRecord>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct EpochRecord {
    measured_at: Timestamp,
    pattern: Recorded,
}

/// Why something could not be kept or found.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The directory is not there, not ours, or full.
    #[error("cannot {what} {}: {source}; the agent works on, but forgets its patterns when it restarts", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the kernel says.
        source: io::Error,
    },
    /// A file that holds something else.
    #[error("the checkpoint {} cannot be used ({why}): set aside as {}; the VM is looked at anew, and nothing needs to be done", path.display(), aside.display())]
    Corrupt {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
        /// Where it is now.
        aside: PathBuf,
    },
}

/// The directory.
#[derive(Debug, Clone)]
pub struct Checkpoint(PathBuf);

impl Checkpoint {
    /// Makes the directory if need be.
    pub fn open(directory: &Path) -> Result<Self, CheckpointError> {
        fs::create_dir_all(directory).map_err(|source| failed("make the directory", directory, source))?;
        Ok(Self(directory.to_owned()))
    }

    /// Where dry runs keep the settings of the QEMUs that they borrow.
    pub fn settings(&self) -> PathBuf {
        self.0.join("settings")
    }

    /// What is known of a pod's VM, oldest first; nothing, where nothing was kept.
    pub fn load(&self, pod_uid: &str) -> Result<Vec<Epoch>, CheckpointError> {
        let Some(path) = self.path(pod_uid) else { return Ok(vec![]) };
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
            Err(source) => return Err(failed("read", &path, source)),
        };
        read(&bytes, pod_uid).map_err(|why| {
            let aside = path.with_extension("corrupt");
            // If even that fails, the next pattern overwrites it.
            let _ = fs::rename(&path, &aside);
            CheckpointError::Corrupt { path, why, aside }
        })
    }

    /// Keeps these, and makes room for them where all files together grow too large: those written longest ago go first.
    pub fn save(&self, pod_uid: &str, epochs: &[Epoch]) -> Result<(), CheckpointError> {
        let Some(path) = self.path(pod_uid) else { return Ok(()) };
        let newest = epochs.get(epochs.len().saturating_sub(EPOCHS)..).unwrap_or(epochs);
        let file = File {
            version: VERSION,
            pod_uid: pod_uid.to_owned(),
            epochs: newest.iter().map(|e| EpochRecord { measured_at: e.measured_at, pattern: e.pattern.record() }).collect(),
        };
        let bytes = serde_json::to_vec(&file).map_err(|error| failed("write", &path, error.into()))?;
        // Beside it and then over it: a crash in between leaves the old one whole.
        let new = path.with_extension("new");
        fs::write(&new, bytes).and_then(|()| fs::rename(&new, &path)).map_err(|source| {
            let _ = fs::remove_file(&new);
            failed("write", &path, source)
        })?;
        self.bound()
    }

    /// Forgets everything about pods that are not among these.
    pub fn keep_only(&self, is_here: impl Fn(&str) -> bool) -> Result<(), CheckpointError> {
        for (path, ..) in self.files()? {
            let here = path.file_stem().and_then(|stem| stem.to_str()).is_some_and(&is_here);
            if !here {
                remove(&path)?;
            }
        }
        Ok(())
    }

    fn bound(&self) -> Result<(), CheckpointError> {
        let mut files = self.files()?;
        files.sort_by_key(|&(_, _, written)| std::cmp::Reverse(written));
        let mut sum = 0;
        for (path, length, _) in files {
            sum += length;
            if sum > MOST_BYTES {
                remove(&path)?;
            }
        }
        Ok(())
    }

    /// Everything that lies there, whatever it is: path, length, when it was written.
    fn files(&self) -> Result<Vec<(PathBuf, u64, SystemTime)>, CheckpointError> {
        let list = |source| failed("list", &self.0, source);
        let mut files = vec![];
        for entry in fs::read_dir(&self.0).map_err(list)? {
            let entry = entry.map_err(list)?;
            // It may be gone by now.
            let Ok(found) = entry.metadata() else { continue };
            if found.is_file() {
                files.push((entry.path(), found.len(), found.modified().unwrap_or(SystemTime::UNIX_EPOCH)));
            }
        }
        Ok(files)
    }

    /// A pod UID comes from an object, so it may be any text: what is no plain name becomes no path.
    fn path(&self, pod_uid: &str) -> Option<PathBuf> {
        is_plain_uid(pod_uid).then(|| self.0.join(format!("{pod_uid}.{SUFFIX}")))
    }
}

fn remove(path: &Path) -> Result<(), CheckpointError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(failed("remove", path, source)),
        _ => Ok(()),
    }
}

fn failed(what: &'static str, path: &Path, source: io::Error) -> CheckpointError {
    CheckpointError::Io { what, path: path.to_owned(), source }
}

fn read(bytes: &[u8], pod_uid: &str) -> Result<Vec<Epoch>, String> {
    let file: File = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    if file.version != VERSION {
        return Err(format!("it is of version {}, this agent reads {VERSION}", file.version));
    }
    if file.pod_uid != pod_uid {
        return Err("it is another pod's".to_owned());
    }
    let epoch = |record: EpochRecord| {
        let pattern = record.pattern.restore().map_err(|error| error.to_string())?;
        Ok(Epoch { measured_at: record.measured_at, pattern: Arc::new(pattern) })
    };
    file.epochs.into_iter().map(epoch).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::model::pattern::{Sample, Traces, Writer};

    const UID: &str = "0f6c3f0e-0a3b-4b62-9c5e-6f6b3a1b2c3d";

    fn epoch(second: i64) -> Epoch {
        let sample = |page, writer| Sample { page, weight: 3.5, zero: page == 9, writer };
        let samples = vec![
            sample(0, Writer::Idle),
            sample(7, Writer::Random { rate: 0.25 }),
            sample(8, Writer::Periodic { period: 12.0, at: 3.0 }),
            sample(9, Writer::Traced { row: 0 }),
        ];
        let traces = Traces { length_ms: 100.0, rows: vec![vec![1.0, 50.5]] };
        Epoch {
            measured_at: Timestamp::from_second(second).unwrap(),
            pattern: Arc::new(Pattern::new(samples, traces, 1000.0).unwrap()),
        }
    }

    #[test]
    fn what_was_kept_comes_back_and_only_the_newest_epochs() {
        let dir = tempfile::tempdir().unwrap();
        let store = Checkpoint::open(&dir.path().join("patterns")).unwrap();
        assert_eq!(store.load(UID).unwrap(), []);
        let epochs: Vec<_> = (0..5).map(epoch).collect();
        store.save(UID, &epochs).unwrap();
        assert_eq!(Checkpoint::open(&dir.path().join("patterns")).unwrap().load(UID).unwrap(), epochs[2..]);
        store.keep_only(|uid| uid == UID).unwrap();
        assert_eq!(store.load(UID).unwrap().len(), EPOCHS);
        store.keep_only(|_| false).unwrap();
        assert_eq!(store.load(UID).unwrap(), []);
    }

    #[test]
    fn a_corrupt_file_is_set_aside_and_said() {
        let dir = tempfile::tempdir().unwrap();
        let store = Checkpoint::open(dir.path()).unwrap();
        store.save(UID, &[epoch(1)]).unwrap();
        let path = dir.path().join(format!("{UID}.json"));
        let whole = fs::read(&path).unwrap();
        let absurd = String::from_utf8(whole.clone()).unwrap().replace("3.5", "-3.5");
        let newer = String::from_utf8(whole.clone()).unwrap().replace("\"version\":1", "\"version\":7");
        let others = String::from_utf8(whole.clone()).unwrap().replace(UID, "another");
        for bad in [b"".as_slice(), &whole[..whole.len() / 2], b"\0\xff", absurd.as_bytes(), newer.as_bytes(), others.as_bytes()]
        {
            fs::write(&path, bad).unwrap();
            let error = store.load(UID).unwrap_err();
            assert!(matches!(error, CheckpointError::Corrupt { .. }) && error.to_string().contains("set aside"), "{error}");
            assert!(!path.exists() && path.with_extension("corrupt").exists());
            assert_eq!(store.load(UID).unwrap(), []);
        }
        // What was set aside does not stay for ever.
        store.keep_only(|uid| uid == "another").unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn an_odd_pod_uid_is_no_path() {
        let outer = tempfile::tempdir().unwrap();
        let store = Checkpoint::open(&outer.path().join("in")).unwrap();
        for uid in ["../x", "", "/etc/x", "a/b"] {
            store.save(uid, &[epoch(1)]).unwrap();
            assert_eq!(store.load(uid).unwrap(), []);
        }
        assert_eq!(fs::read_dir(outer.path().join("in")).unwrap().count() + fs::read_dir(outer.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_cannot_be_written_is_an_error_with_a_name() {
        let dir = tempfile::tempdir().unwrap();
        let store = Checkpoint::open(&dir.path().join("gone")).unwrap();
        fs::remove_dir(dir.path().join("gone")).unwrap();
        let error = store.save(UID, &[epoch(1)]).unwrap_err().to_string();
        assert!(error.contains(UID) && error.contains("works on"), "{error}");
    }

    #[test]
    fn all_files_together_are_bounded_and_the_oldest_go_first() {
        let dir = tempfile::tempdir().unwrap();
        let store = Checkpoint::open(dir.path()).unwrap();
        for (name, age) in [("old", 200), ("older", 300)] {
            let file = fs::File::create(dir.path().join(format!("{name}.json"))).unwrap();
            file.set_len(MOST_BYTES / 2).unwrap();
            file.set_modified(SystemTime::now() - std::time::Duration::from_secs(age)).unwrap();
        }
        store.save(UID, &[epoch(1)]).unwrap();
        let left: Vec<_> =
            ["old", "older", UID].into_iter().filter(|name| dir.path().join(format!("{name}.json")).exists()).collect();
        assert_eq!(left, ["old", UID]);
    }
}
