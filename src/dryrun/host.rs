//! What the host says of the QEMU process: realtime threads, CPUs of its own, room under its memory limits. In: roots of `/proc` and of
//! the cgroup file systems, a process. Out: plain answers. The files are the kernel's; the process can shape names in them only.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::cgroup::{self, Place};
use crate::model::units::Bytes;

/// `SCHED_FIFO`, `SCHED_RR`, `SCHED_DEADLINE` (sched(7)).
const REALTIME: [u32; 3] = [1, 2, 6];
/// cgroup v1's way to say that there is no limit: `PAGE_COUNTER_MAX` in bytes, rounded to pages. No machine has so much.
const NO_LIMIT: u64 = 1 << 62;

/// Where the kernel tells.
#[derive(Debug, Clone)]
pub(super) struct Roots {
    pub(super) proc: PathBuf,
    pub(super) cgroup: PathBuf,
}

impl Default for Roots {
    fn default() -> Self {
        Self { proc: "/proc".into(), cgroup: "/sys/fs/cgroup".into() }
    }
}

/// Why the room under the memory limits is not known.
#[derive(Debug, thiserror::Error)]
pub enum HeadroomError {
    /// Nobody says which process QEMU is.
    #[error("which process QEMU is, is not known")]
    NoProcess,
    /// A file of the kernel's is missing or unreadable.
    #[error("cannot read {}: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file of the kernel's has other words than expected.
    #[error("{} makes no sense", path.display())]
    Odd {
        /// The file.
        path: PathBuf,
    },
    /// It is in a cgroup outside of our namespace, and not to be seen where the host has its own.
    #[error("its cgroup {path} is not to be seen from here: the agent needs the host's PID namespace and SYS_PTRACE")]
    Elsewhere {
        /// As the kernel tells of it.
        path: String,
    },
}

/// The tightest of the limits above a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Headroom {
    /// Limit less what is in use and cannot be given back.
    pub(super) free: Bytes,
    /// The cgroup whose limit it is.
    pub(super) cgroup: PathBuf,
}

/// Has any thread of the process a realtime scheduling policy?
pub(super) fn realtime(proc: &Path, pid: i32) -> bool {
    tasks(proc, pid).iter().any(|task| policy(task).is_some_and(|policy| REALTIME.contains(&policy)))
}

/// Is each of the guest's CPUs tied to one CPU of the host? `threads` are numbered as the process's own PID namespace does.
pub(super) fn dedicated(proc: &Path, pid: i32, threads: &[i32]) -> bool {
    let online = fs::read_to_string(proc.join("cpuinfo")).map_or(0, |text| text.matches("processor\t").count());
    let tasks = tasks(proc, pid);
    let tied = |thread: &i32| {
        let mut statuses = tasks.iter().filter_map(|task| fs::read_to_string(task.join("status")).ok());
        let found = statuses
            .find(|status| line(status, "NSpid:").and_then(|ids| ids.split_whitespace().last()?.parse().ok()) == Some(*thread));
        found.is_some_and(|status| line(&status, "Cpus_allowed_list:").is_some_and(|list| list.trim().parse::<u32>().is_ok()))
    };
    online > 1 && !threads.is_empty() && threads.iter().all(tied)
}

fn tasks(proc: &Path, pid: i32) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(proc.join(pid.to_string()).join("task")) else { return Vec::new() };
    entries.filter_map(|entry| entry.ok().map(|entry| entry.path())).collect()
}

/// Field 41 of `stat`; the second, the name, may hold anything and ends with the last parenthesis.
fn policy(task: &Path) -> Option<u32> {
    let stat = fs::read_to_string(task.join("stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(38)?.parse().ok()
}

fn line<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(key))
}

/// How much the process may still take before a memory limit of its cgroups is met; `None` where there is no limit.
pub(super) fn headroom(roots: &Roots, pid: i32) -> Result<Option<Headroom>, HeadroomError> {
    let file = roots.proc.join(pid.to_string()).join("cgroup");
    let text = fs::read_to_string(&file).map_err(|source| HeadroomError::Unreadable { path: file.clone(), source })?;
    // `4:memory:/path` of version 1 where the controller is there, else `0::/path` of version 2.
    let of = |wanted: &dyn Fn(&str) -> bool| {
        text.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let controllers = fields.next()?;
            wanted(controllers).then(|| fields.next()).flatten()
        })
    };
    let v1 = of(&|controllers| controllers.split(',').any(|name| name == "memory"));
    let (controller, path, files) = match (v1, of(&str::is_empty)) {
        (Some(path), _) => ("memory", path, ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
        (None, Some(path)) => ("", path, ("memory.max", "memory.current", "inactive_file")),
        (None, None) => return Err(HeadroomError::Odd { path: file }),
    };
    let hosts = roots.proc.join("1/root/sys/fs/cgroup");
    let Some(Place { mount, mut cgroup }) = cgroup::find(&roots.cgroup.join(controller), &hosts.join(controller), path, pid)
    else {
        return Err(HeadroomError::Elsewhere { path: path.to_owned() });
    };
    let mut least: Option<Headroom> = None;
    while cgroup.starts_with(&mount) && cgroup != mount {
        if let Some(free) = room(&cgroup, files)?
            && least.as_ref().is_none_or(|least| free < least.free)
        {
            least = Some(Headroom { free, cgroup: cgroup.clone() });
        }
        cgroup.pop();
    }
    Ok(least)
}

/// The room in one cgroup; `None` without a limit.
fn room(cgroup: &Path, (limit, usage, cache): (&str, &str, &str)) -> Result<Option<Bytes>, HeadroomError> {
    let read = |name: &str| {
        let path = cgroup.join(name);
        fs::read_to_string(&path).map_err(|source| HeadroomError::Unreadable { path, source })
    };
    let number = |name: &str, text: &str| text.trim().parse::<u64>().map_err(|_| HeadroomError::Odd { path: cgroup.join(name) });
    let text = match read(limit) {
        // A cgroup without the memory controller.
        Err(HeadroomError::Unreadable { source, .. }) if source.kind() == io::ErrorKind::NotFound && cgroup.is_dir() => {
            return Ok(None);
        }
        other => other?,
    };
    if text.trim() == "max" {
        return Ok(None);
    }
    let limit = number(limit, &text)?;
    if limit >= NO_LIMIT {
        return Ok(None);
    }
    let used = number(usage, &read(usage)?)?;
    // Files that nobody has used lately are given back before anything is killed.
    let stat = read("memory.stat")?;
    let idle = line(&stat, cache).and_then(|value| value.trim().parse().ok()).unwrap_or(0);
    Ok(Some(Bytes(limit.saturating_sub(used.saturating_sub(idle)))))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn host(files: &[(&str, &str)]) -> (tempfile::TempDir, Roots) {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let roots = Roots { proc: dir.path().join("proc"), cgroup: dir.path().join("cg") };
        (dir, roots)
    }

    #[test]
    fn the_tightest_limit_above_counts() {
        let (dir, roots) = host(&[
            ("proc/7/cgroup", "0::/pods/pod1/vm\n"),
            ("cg/pods/pod1/vm/memory.max", "max\n"),
            ("cg/pods/pod1/memory.max", "1000000\n"),
            ("cg/pods/pod1/memory.current", "900000\n"),
            ("cg/pods/pod1/memory.stat", "anon 700000\ninactive_file 50000\n"),
            ("cg/pods/memory.max", "9000000\n"),
            ("cg/pods/memory.current", "900000\n"),
            ("cg/pods/memory.stat", "anon 700000\n"),
        ]);
        let found = headroom(&roots, 7).unwrap().unwrap();
        assert_eq!(found, Headroom { free: Bytes(150_000), cgroup: dir.path().join("cg/pods/pod1") });
    }

    #[test]
    fn version_1_has_a_controller_of_its_own() {
        let (_dir, roots) = host(&[
            ("proc/7/cgroup", "5:cpu,cpuacct:/x\n4:memory:/pod\n0::/\n"),
            ("cg/memory/pod/memory.limit_in_bytes", "5000\n"),
            ("cg/memory/pod/memory.usage_in_bytes", "6000\n"),
            ("cg/memory/pod/memory.stat", "total_inactive_file 100\n"),
        ]);
        assert_eq!(headroom(&roots, 7).unwrap().unwrap().free, Bytes(0));
        let (_dir, roots) =
            host(&[("proc/7/cgroup", "4:memory:/pod\n"), ("cg/memory/pod/memory.limit_in_bytes", "9223372036854771712\n")]);
        assert_eq!(headroom(&roots, 7).unwrap(), None);
    }

    #[test]
    fn what_cannot_be_read_is_no_room() {
        let (_dir, roots) = host(&[("proc/7/cgroup", "0::/pod\n"), ("cg/pod/memory.max", "lots\n")]);
        assert!(matches!(headroom(&roots, 7), Err(HeadroomError::Odd { .. })));
        assert!(matches!(headroom(&roots, 8), Err(HeadroomError::Unreadable { .. })));
        let (_dir, roots) = host(&[("proc/7/cgroup", "")]);
        assert!(matches!(headroom(&roots, 7), Err(HeadroomError::Odd { .. })));
        // Outside of our namespace, and the host's first process cannot be looked through.
        let (_dir, roots) = host(&[("proc/7/cgroup", "0::/../other\n")]);
        assert!(matches!(headroom(&roots, 7), Err(HeadroomError::Elsewhere { .. })));
    }

    #[test]
    fn from_a_pod_the_limit_is_read_where_the_host_has_it() {
        let (dir, roots) = host(&[
            ("proc/7/cgroup", "0::/../../vm/compute\n"),
            ("proc/1/root/sys/fs/cgroup/pods/vm/compute/cgroup.procs", "7\n"),
            ("proc/1/root/sys/fs/cgroup/pods/vm/compute/memory.max", "max\n"),
            ("proc/1/root/sys/fs/cgroup/pods/vm/memory.max", "1000000\n"),
            ("proc/1/root/sys/fs/cgroup/pods/vm/memory.current", "900000\n"),
            ("proc/1/root/sys/fs/cgroup/pods/vm/memory.stat", "inactive_file 50000\n"),
            ("proc/1/root/sys/fs/cgroup/pods/memory.max", "max\n"),
        ]);
        let found = headroom(&roots, 7).unwrap().unwrap();
        let cgroup = dir.path().join("proc/1/root/sys/fs/cgroup/pods/vm");
        assert_eq!(found, Headroom { free: Bytes(150_000), cgroup });
    }

    #[test]
    fn threads_tell_of_realtime_and_of_cpus_of_their_own() {
        let stat = |policy: u32| format!("9 (CPU 0/KVM) ) S {} {policy} 0\n", ["0"; 37].join(" "));
        let status = |list: &str| format!("Name:\tCPU 0/KVM\nNSpid:\t9\t3\nCpus_allowed_list:\t{list}\n");
        let cpus = "processor\t: 0\nprocessor\t: 1\n";
        let of = |policy, list: &str| {
            host(&[("proc/cpuinfo", cpus), ("proc/7/task/9/stat", &stat(policy)), ("proc/7/task/9/status", &status(list))])
        };
        let (_dir, calm) = of(0, "0-1");
        assert!(!realtime(&calm.proc, 7) && !dedicated(&calm.proc, 7, &[3]));
        let (_dir, tied) = of(1, "1");
        assert!(realtime(&tied.proc, 7) && dedicated(&tied.proc, 7, &[3]));
        assert!(!dedicated(&tied.proc, 7, &[]) && !dedicated(&tied.proc, 7, &[3, 4]));
    }
}
