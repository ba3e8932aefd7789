//! Processes of this machine: which one is a pod's QEMU. In: a `/proc`, the UID of a pod or of a machine. Out: a process id,
//! or why there is none.
//!
//! A VM's identity is its process's cgroup, which the kernel writes and no guest can: the name on a QEMU's command line is only
//! what somebody once wrote there.

use std::{
    fmt,
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
    str::FromStr,
};

/// The longest `/proc/PID/cgroup` or `/proc/PID/cmdline` that is read, bytes.
const LONGEST: u64 = 1 << 20;

/// The UID of a pod, as the API server gives it: a UUID in lower case.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PodUid(String);

/// It is no pod's UID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("it is no pod's UID, which is a UUID such as 0f6c3f0e-0a3b-4b62-9c5e-6f6b3a1b2c3d")]
pub struct NotAPodUid;

impl FromStr for PodUid {
    type Err = NotAPodUid;

    fn from_str(text: &str) -> Result<Self, NotAPodUid> {
        let lengths = text.split('-').map(str::len).eq([8, 4, 4, 4, 12]);
        let digits = text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f' | b'-'));
        if lengths && digits { Ok(Self(text.to_owned())) } else { Err(NotAPodUid) }
    }
}

impl fmt::Display for PodUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why no process was found.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// The pod has no QEMU here.
    #[error(
        "no process of pod {pod} is a QEMU: the VM is gone or still starting, or this container does not see the node's processes (hostPID)"
    )]
    None {
        /// The pod.
        pod: PodUid,
    },
    /// It has more than one.
    #[error("more than one process of pod {pod} is a QEMU ({}): one may be on its way out; try again", listed(pids))]
    Several {
        /// The pod.
        pod: PodUid,
        /// All of them.
        pids: Vec<i32>,
    },
    /// Somebody else's process.
    #[error("process {pid} does not belong to pod {pod} (its cgroup says {}): it is not believed", found.as_ref().map_or("no pod".to_owned(), |other| format!("pod {other}")))]
    Foreign {
        /// The process.
        pid: i32,
        /// Whose it should be.
        pod: PodUid,
        /// Whose it is.
        found: Option<PodUid>,
    },
    /// `/proc` cannot be read.
    #[error("cannot read {}: {source}; is /proc mounted, and does this container see the node's processes (hostPID)?", path.display())]
    Io {
        /// What was read.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

fn listed(pids: &[i32]) -> String {
    pids.iter().map(i32::to_string).collect::<Vec<_>>().join(", ")
}

/// A view of processes: `/proc`, or wherever another one is mounted.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Processes(PathBuf);

impl Default for Processes {
    fn default() -> Self {
        Self::new("/proc")
    }
}

impl Processes {
    /// Those of this `/proc`.
    pub fn new(proc: impl AsRef<Path>) -> Self {
        Self(proc.as_ref().to_owned())
    }

    /// The pod that a process belongs to; `None`: none, or the process is gone.
    pub fn pod_of(&self, pid: i32) -> Option<PodUid> {
        pod_of(&read(&self.0.join(pid.to_string()).join("cgroup")).ok()?)
    }

    /// An error unless the process belongs to the pod.
    pub fn ensure_of(&self, pid: i32, pod: &PodUid) -> Result<(), ProcessError> {
        match self.pod_of(pid) {
            Some(found) if found == *pod => Ok(()),
            found => Err(ProcessError::Foreign { pid, pod: pod.clone(), found }),
        }
    }

    /// The one QEMU of the pod.
    pub fn qemu_of(&self, pod: &PodUid) -> Result<i32, ProcessError> {
        let of_pod = |pid: &i32| self.pod_of(*pid).as_ref() == Some(pod);
        let mut pids: Vec<i32> = self.pids()?.into_iter().filter(of_pod).filter(|pid| self.is_qemu(*pid)).collect();
        match (pids.pop(), pids.is_empty()) {
            (None, _) => Err(ProcessError::None { pod: pod.clone() }),
            (Some(pid), true) => Ok(pid),
            (Some(pid), false) => {
                pids.push(pid);
                Err(ProcessError::Several { pod: pod.clone(), pids })
            }
        }
    }

    /// The one QEMU that was started with this `-uuid`. A hint and no proof: whoever trusts it must hold it against what QEMU
    /// itself says of its memory.
    pub fn qemu_with_uuid(&self, uuid: &str) -> Option<i32> {
        let mut found = self.pids().ok()?.into_iter().filter(|pid| self.is_qemu(*pid) && self.has_uuid(*pid, uuid));
        found.next().filter(|_| found.next().is_none())
    }

    fn has_uuid(&self, pid: i32, uuid: &str) -> bool {
        let line = read(&self.0.join(pid.to_string()).join("cmdline")).unwrap_or_default();
        let words: Vec<&str> = line.split('\0').collect();
        words.windows(2).any(|pair| matches!(pair, ["-uuid", given] if given.eq_ignore_ascii_case(uuid)))
    }

    /// By its program; where we may not see that, by the name that the kernel keeps.
    fn is_qemu(&self, pid: i32) -> bool {
        let process = self.0.join(pid.to_string());
        let program = fs::read_link(process.join("exe"));
        let program = program.as_ref().ok().and_then(|path| path.file_name()).map(|name| name.to_string_lossy().into_owned());
        program.or_else(|| read(&process.join("comm")).ok()).is_some_and(|name| name.starts_with("qemu"))
    }

    fn pids(&self) -> Result<Vec<i32>, ProcessError> {
        let io = |source| ProcessError::Io { path: self.0.clone(), source };
        let entries = fs::read_dir(&self.0).map_err(io)?;
        // What vanishes while we look is no process any more.
        Ok(entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
    }
}

fn read(path: &Path) -> io::Result<String> {
    let mut bytes = Vec::new();
    File::open(path)?.take(LONGEST).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Reads `/proc/PID/cgroup`, version 1 or 2: lines of `number:controllers:path`. Lines that name different pods name none.
fn pod_of(text: &str) -> Option<PodUid> {
    let mut pods = text.lines().filter_map(|line| line.splitn(3, ':').nth(2)).filter_map(pod_in);
    let first = pods.next()?;
    pods.all(|other| other == first).then_some(first)
}

/// The outermost pod of a path: whoever may make cgroups below its own can name them as it likes.
fn pod_in(path: &str) -> Option<PodUid> {
    path.split('/').find_map(|name| {
        match name.strip_suffix(".slice") {
            // systemd: kubepods-burstable-pod0f6c3f0e_0a3b_4b62_9c5e_6f6b3a1b2c3d.slice
            Some(slice) => slice.rsplit_once("-pod").map(|(_, uid)| uid.replace('_', "-")),
            // cgroupfs: kubepods/burstable/pod0f6c3f0e-0a3b-4b62-9c5e-6f6b3a1b2c3d
            None => name.strip_prefix("pod").map(str::to_owned),
        }?
        .parse()
        .ok()
    })
}

#[cfg(test)]
#[path = "process_tests.rs"]
mod tests;
