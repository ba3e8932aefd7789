//! Where the cgroup of a process is among the files.
//!
//! In: a mount of the cgroup file system, the path that `/proc/PID/cgroup` gives. Out: the directory, and the mount that it is below.
//! An agent in a pod has a cgroup namespace of its own, as container runtimes make it: the cgroups of others are told of with `..`, from where
//! we are, and are not below our mount. They are found below the mount of the host's first process, which a pod with hostPID and
//! `SYS_PTRACE` may look through.

use std::{
    collections::VecDeque,
    fs,
    path::{Component, Path, PathBuf},
};

/// So many directories are looked at. A node has some thousand cgroups, and those of pods are in its upper floors.
const MOST: usize = 50_000;

/// A directory, and the mount that it is below.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) mount: PathBuf,
    pub(super) cgroup: PathBuf,
}

/// The directory of this process's cgroup. `host`: where the host's first process has the same mount. `None`: it is nowhere to be seen.
pub(super) fn find(mount: &Path, host: &Path, path: &str, pid: i32) -> Option<Place> {
    let path = Path::new(path.trim_start_matches('/'));
    let below: PathBuf = path.components().skip_while(|part| *part == Component::ParentDir).collect();
    if !below.components().all(|part| matches!(part, Component::Normal(_))) {
        return None;
    }
    if below == path {
        return Some(Place { mount: mount.to_owned(), cgroup: mount.join(path) });
    }
    let mut queue = VecDeque::from([host.to_owned()]);
    for _ in 0..MOST {
        let floor = queue.pop_front()?;
        let cgroup = floor.join(&below);
        if holds(&cgroup, pid) {
            return Some(Place { mount: host.to_owned(), cgroup });
        }
        let entries = fs::read_dir(&floor).into_iter().flatten().filter_map(Result::ok);
        queue.extend(entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()));
    }
    None
}

/// The kernel says who is in it: names can be anybody's.
fn holds(cgroup: &Path, pid: i32) -> bool {
    let Ok(procs) = fs::read_to_string(cgroup.join("cgroup.procs")) else { return false };
    procs.lines().any(|line| line.parse() == Ok(pid))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Cgroups of a host, each with the processes in it.
    fn host(cgroups: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (cgroup, procs) in cgroups {
            let path = dir.path().join(cgroup);
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join("cgroup.procs"), procs).unwrap();
        }
        dir
    }

    #[test]
    fn what_is_below_our_mount_is_not_searched_for() {
        let found = find(Path::new("/none"), Path::new("/nowhere"), "/pods/a", 7).unwrap();
        assert_eq!(found, Place { mount: "/none".into(), cgroup: "/none/pods/a".into() });
    }

    #[test]
    fn what_is_beside_us_is_found_where_the_host_has_it() {
        // We are pods/ours/agent; the same names stand elsewhere, with other processes.
        let host =
            host(&[("pods/ours/agent", "1\n2\n"), ("pods/vm/compute", "70\n7\n"), ("other/vm/compute", "77\n"), ("pods/vm", "")]);
        for (path, pid, expected) in [
            ("/../../vm/compute", 7, Some("pods/vm/compute")),
            ("/../../vm/compute", 77, Some("other/vm/compute")),
            ("/../../vm/compute", 8, None),
            ("/../../vm/gone", 7, None),
            ("/../vm/../compute", 7, None),
        ] {
            let found = find(Path::new("/none"), host.path(), path, pid);
            let expected = expected.map(|cgroup| Place { mount: host.path().to_owned(), cgroup: host.path().join(cgroup) });
            assert_eq!(found, expected, "{path} {pid}");
        }
        assert_eq!(find(Path::new("/none"), Path::new("/nowhere"), "/../x", 7), None);
    }
}
