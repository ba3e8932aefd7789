//! A pod's cgroup, made for real as the kubelet would name it. In: the pod's UID, the kubelet's cgroup driver. Out: a cgroup to
//! put processes into, removed with its value.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};

/// How the kubelet names a pod's cgroup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Driver {
    /// `kubepods/burstable/pod<uid>/<container>`
    Cgroupfs,
    /// `kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod<uid>.slice/cri-containerd-<container>.scope`
    Systemd,
}

/// A cgroup with nothing in it yet.
#[derive(Debug)]
pub struct Cgroup {
    mount: PathBuf,
    path: PathBuf,
}

impl Cgroup {
    /// In the unified hierarchy where there is one, else in whichever there is.
    pub fn of_pod(pod_uid: &str, driver: Driver) -> Result<Self> {
        let mount = mount().context("no cgroup hierarchy is mounted")?;
        let below = match driver {
            Driver::Cgroupfs => format!("kubepods/burstable/pod{pod_uid}/0c0ffee0"),
            Driver::Systemd => format!(
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{}.slice/cri-containerd-0c0ffee0.scope",
                pod_uid.replace('-', "_")
            ),
        };
        let path = mount.join(below);
        let mut made = fs::create_dir_all(&path);
        for _ in 0..100 {
            // Another test may have removed the parents at the very moment.
            if made.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
                made = fs::create_dir_all(&path);
            }
        }
        made.with_context(|| format!("this machine lets nobody make the cgroup {}", path.display()))?;
        Ok(Self { mount, path })
    }

    /// Whose process id is written here moves in; 0 is the writer's own.
    pub fn procs(&self) -> PathBuf {
        self.path.join("cgroup.procs")
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for _ in 0..200 {
            match fs::remove_dir(&self.path) {
                // The kernel has not buried the last process yet.
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => std::thread::sleep(Duration::from_millis(10)),
                _ => break,
            }
        }
        for parent in self.path.ancestors().skip(1).take_while(|parent| *parent != self.mount) {
            if fs::remove_dir(parent).is_err() {
                break;
            }
        }
    }
}

fn mount() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let of = |kind: &str| {
        let mut mounts = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        mounts.find_map(|words| match words.as_slice() {
            [_, path, found, ..] if *found == kind => Some(Path::new(path).to_owned()),
            _ => None,
        })
    };
    of("cgroup2").or_else(|| of("cgroup"))
}
