//! Where a pod's QEMU is. The one place that knows; today a directory of QMP sockets named by pod UID.
//!
//! In: a pod UID from an object, so any text. Out: what the collector looks at, or why there is nothing to look at.

use std::{
    io,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
};

use crate::collector::Target;

/// Why a VM was not found.
#[derive(Debug, thiserror::Error)]
pub enum LocateError {
    /// It could lead anywhere, so it becomes no path.
    #[error("spec.podUID is no pod UID: it may hold only letters, digits and dashes; the question has to be written anew")]
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
}

/// Finds the QEMU of a pod.
pub trait Locate: Send + Sync + 'static {
    /// What to look at.
    fn locate(&self, pod_uid: &str) -> Result<Target, LocateError>;
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
        let plain = !pod_uid.is_empty()
            && pod_uid.len() <= 63
            && pod_uid.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        if !plain {
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
}
