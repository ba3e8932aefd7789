//! A pod's cgroup, made for real as the kubelet would name it, or one with a limit. In: the pod's UID and the kubelet's cgroup driver, or how much
//! memory. Out: a cgroup to put processes into, removed with its value.

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
        let mount = mount("cgroup2", "").or_else(|| mount("cgroup", "")).context("no cgroup hierarchy is mounted")?;
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

    /// One whose processes may take so many bytes from now on; what they have is not counted.
    pub fn with_memory(bytes: u64) -> Result<Self> {
        let name = format!("migvisor-lab-{}", std::process::id());
        let (mount, limit) = match mount("cgroup", "memory") {
            Some(mount) => (mount, "memory.limit_in_bytes"),
            None => (mount("cgroup2", "").context("no cgroup hierarchy counts memory")?, "memory.max"),
        };
        if limit == "memory.max" {
            fs::write(mount.join("cgroup.subtree_control"), "+memory").context("this machine delegates no memory controller")?;
        }
        let path = mount.join(name);
        fs::create_dir(&path).with_context(|| format!("this machine lets nobody make the cgroup {}", path.display()))?;
        let cgroup = Self { mount, path };
        fs::write(cgroup.path.join(limit), bytes.to_string()).with_context(|| format!("cannot set {limit}"))?;
        Ok(cgroup)
    }

    /// Moves a whole process in.
    pub fn take_in(&self, pid: u32) -> Result<()> {
        fs::write(self.procs(), pid.to_string()).with_context(|| format!("cannot move {pid} into {}", self.path.display()))
    }

    /// Moves it back up, so that this can go.
    pub fn let_go(&self, pid: u32) -> Result<()> {
        let above = self.mount.join("cgroup.procs");
        fs::write(&above, pid.to_string()).with_context(|| format!("cannot move {pid} into {}", above.display()))
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

/// Where a hierarchy of this version is mounted, with this controller.
fn mount(version: &str, controller: &str) -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let mut mounts = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    mounts.find_map(|words| match words.as_slice() {
        [_, path, found, options, ..] if *found == version => {
            let counts = controller.is_empty() || options.split(',').any(|option| option == controller);
            counts.then(|| Path::new(path).to_owned())
        }
        _ => None,
    })
}
