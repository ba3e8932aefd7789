//! Where a pod's QEMU is. The one place that knows: the pods' directories of the kubelet, or a directory of QMP sockets.
//!
//! In: a pod UID from an object, so any text. Out: what the collector looks at, or why there is nothing to look at.
//!
//! What lies in a pod's directory belongs to the pod, which may be hostile: its libvirt is only believed as far as the kernel
//! vouches for who it is.

use std::{
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::FileTypeExt,
    },
    path::{Path, PathBuf},
};

use crate::{
    collector::Target,
    dryrun::Meeting,
    qemu::{
        libvirt::{LibvirtAddress, Owner, Socket, folder_beneath},
        process::{PodUid, ProcessError, Processes},
    },
};

/// Where virt-launcher's libvirt listens, from the pod's directory on (KubeVirt: `pkg/virt-controller/services/rendervolumes.go`).
const LIBVIRT_SOCKET: &str = "volumes/kubernetes.io~empty-dir/libvirt-runtime/virtqemud-sock";

/// The same folder, as the pod sees it.
const LIBVIRT_RUNTIME: &str = "/var/run/libvirt";

/// Why a VM was not found.
#[derive(Debug, thiserror::Error)]
pub enum LocateError {
    /// It could lead anywhere, so it becomes no path.
    #[error("spec.podUID is no pod UID, which is a UUID in lower case; the question has to be written anew")]
    NotAUid,
    /// No socket of that name.
    #[error("no QEMU of this pod is on this node ({} is missing): the VM is gone or still starting; nothing to do if it just moved", path.display())]
    NoSocket {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// Something else of that name.
    #[error("{} is no socket: put the QMP socket of the pod's QEMU there (a link is not followed)", path.display())]
    NotASocket {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// It cannot be looked at.
    #[error("cannot look at {}: {source}; let the agent read that directory", path.display())]
    Io {
        /// Where it was looked for.
        path: PathBuf,
        /// What the kernel says.
        source: io::Error,
    },
    /// No process is the pod's QEMU.
    #[error(transparent)]
    Process(#[from] ProcessError),
}

/// A pod UID comes from an object, so it may be any text: only a plain name may become part of a path.
pub fn is_plain_uid(pod_uid: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    (1..=63).contains(&pod_uid.len()) && pod_uid.bytes().all(plain)
}

/// Finds the QEMU of a pod.
pub trait Locate: Send + Sync + 'static {
    /// What to look at.
    fn locate(&self, pod_uid: &str) -> Result<Target, LocateError>;

    /// Where a pod's QEMU and we can meet at a socket, as both see it; `None`: wherever programs of one machine meet.
    fn meeting(&self, pod_uid: &str) -> Result<Option<MeetingPlace>, LocateError>;
}

/// A folder of a pod's, held open: the pod may put a link in its place meanwhile.
#[derive(Debug)]
pub struct MeetingPlace {
    folder: OwnedFd,
}

impl MeetingPlace {
    /// Good for as long as this lives.
    pub fn meeting(&self) -> Meeting {
        Meeting { ours: format!("/proc/self/fd/{}", self.folder.as_raw_fd()).into(), theirs: LIBVIRT_RUNTIME.into() }
    }
}

/// `DIR/<podUID>.sock`.
#[derive(Debug, Clone)]
pub struct SocketDirectory(PathBuf);

impl SocketDirectory {
    /// The directory that holds the sockets.
    pub fn new(directory: impl AsRef<Path>) -> Self {
        Self(directory.as_ref().to_owned())
    }
}

impl Locate for SocketDirectory {
    fn locate(&self, pod_uid: &str) -> Result<Target, LocateError> {
        if !is_plain_uid(pod_uid) {
            return Err(LocateError::NotAUid);
        }
        let path = self.0.join(format!("{pod_uid}.sock"));
        match std::fs::symlink_metadata(&path) {
            Ok(found) if found.file_type().is_socket() => Ok(Target { monitor: path.into(), pid: None }),
            Ok(_) => Err(LocateError::NotASocket { path }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(LocateError::NoSocket { path }),
            Err(source) => Err(LocateError::Io { path, source }),
        }
    }

    fn meeting(&self, _pod_uid: &str) -> Result<Option<MeetingPlace>, LocateError> {
        Ok(None)
    }
}

/// The pods' directories, as the kubelet lays them out: `DIR/<podUID>/volumes/…`; through the libvirt of each pod.
#[derive(Debug, Clone)]
pub struct PodsDirectory {
    directory: PathBuf,
    processes: Option<Processes>,
}

impl PodsDirectory {
    /// Looks the pod's QEMU up among these processes, and holds whoever listens against the pod's cgroup.
    pub fn new(directory: impl AsRef<Path>, processes: Processes) -> Self {
        Self { directory: directory.as_ref().to_owned(), processes: Some(processes) }
    }

    /// Sees no processes: then QEMU has to measure by itself, and whoever listens in the pod's own directory is believed.
    pub fn without_processes(directory: impl AsRef<Path>) -> Self {
        Self { directory: directory.as_ref().to_owned(), processes: None }
    }
}

impl Locate for PodsDirectory {
    fn locate(&self, pod_uid: &str) -> Result<Target, LocateError> {
        let pod: PodUid = pod_uid.parse().map_err(|_| LocateError::NotAUid)?;
        let pid = self.processes.as_ref().map(|processes| processes.qemu_of(&pod)).transpose()?;
        let socket = Socket::beneath(&self.directory, Path::new(pod_uid).join(LIBVIRT_SOCKET));
        let owner = self.processes.clone().map(|processes| Owner { pod, processes });
        Ok(Target { monitor: LibvirtAddress { socket, domain: None, owner }.into(), pid })
    }

    fn meeting(&self, pod_uid: &str) -> Result<Option<MeetingPlace>, LocateError> {
        let pod: PodUid = pod_uid.parse().map_err(|_| LocateError::NotAUid)?;
        let socket = Path::new(&pod.to_string()).join(LIBVIRT_SOCKET);
        let path = socket.parent().unwrap_or(&socket);
        let folder = folder_beneath(&self.directory, path)
            .map_err(|source| LocateError::Io { path: self.directory.join(path), source })?;
        Ok(Some(MeetingPlace { folder }))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::{fs::symlink, net::UnixListener};

    use super::*;

    const UID: &str = "0f6c3f0e-0a3b-4b62-9c5e-6f6b3a1b2c3d";

    #[test]
    fn only_a_socket_of_a_plain_name_is_found() {
        let outer = tempfile::tempdir().unwrap();
        let dir = outer.path().join("sockets");
        std::fs::create_dir(&dir).unwrap();
        let _outside = UnixListener::bind(outer.path().join("x.sock")).unwrap();
        let here = SocketDirectory::new(&dir);
        for uid in ["", "../x", "..", "/x", "a/b", "a\0b", "é", ".", "x.sock", &"a".repeat(64)] {
            assert!(matches!(here.locate(uid), Err(LocateError::NotAUid)), "{uid:?}");
        }
        assert!(matches!(here.locate(UID), Err(LocateError::NoSocket { .. })));
        symlink(outer.path().join("x.sock"), dir.join(format!("{UID}.sock"))).unwrap();
        assert!(matches!(here.locate(UID), Err(LocateError::NotASocket { .. })));
        std::fs::remove_file(dir.join(format!("{UID}.sock"))).unwrap();
        let _socket = UnixListener::bind(dir.join(format!("{UID}.sock"))).unwrap();
        assert_eq!(here.locate(UID).unwrap().monitor, dir.join(format!("{UID}.sock")).into());
    }

    #[test]
    fn a_pod_is_found_by_its_uid_and_its_cgroup_only() {
        let proc = tempfile::tempdir().unwrap();
        let pods = PodsDirectory::new("/pods", Processes::new(proc.path()));
        for uid in ["", "../x", "..", UID.to_uppercase().as_str(), &format!("{UID}/../x"), &format!("{UID}\0"), "vm1"] {
            assert!(matches!(pods.locate(uid), Err(LocateError::NotAUid)), "{uid:?}");
            assert!(matches!(PodsDirectory::without_processes("/pods").locate(uid), Err(LocateError::NotAUid)), "{uid:?}");
        }
        let none = pods.locate(UID).unwrap_err();
        assert!(matches!(&none, LocateError::Process(ProcessError::None { .. })), "{none:?}");
        let process = proc.path().join("42");
        std::fs::create_dir(&process).unwrap();
        std::fs::write(process.join("comm"), "qemu-kvm\n").unwrap();
        std::fs::write(process.join("cgroup"), format!("0::/kubepods/pod{UID}/1\n")).unwrap();
        let target = pods.locate(UID).unwrap();
        assert_eq!(target.pid, Some(42));
        let text = target.monitor.to_string();
        assert!(text.ends_with(&format!("/pods/{UID}/volumes/kubernetes.io~empty-dir/libvirt-runtime/virtqemud-sock")), "{text}");
        assert_eq!(PodsDirectory::without_processes("/pods").locate(UID).unwrap().pid, None);
    }
}
