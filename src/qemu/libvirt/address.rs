//! Where a libvirt daemon is, and which of its domains is meant. In: a URI or a path, as people write them. Out: an address.

use std::{
    env, fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

use percent_encoding::percent_decode_str;

use crate::qemu::process::{PodUid, Processes};

/// The daemon's own names for its socket: virtqemud's, and libvirtd's where one daemon does everything.
const NAMES: [&str; 2] = ["virtqemud-sock", "libvirt-sock"];

/// A domain of a libvirt daemon.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct LibvirtAddress {
    /// Where its daemon listens.
    pub socket: Socket,
    /// Its name; `None`: the only domain that runs there.
    pub domain: Option<String>,
    /// Whose process the daemon has to be; `None`: whoever listens there is believed.
    pub owner: Option<Owner>,
}

/// A daemon's socket.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Socket {
    /// The first of these that exists. Links are followed: who names it vouches for it.
    Named(Vec<PathBuf>),
    /// Below a directory whose contents belong to somebody who is not trusted: nothing leads out of it, no link is followed.
    Beneath {
        /// The directory that is trusted.
        directory: PathBuf,
        /// The path from there.
        path: PathBuf,
    },
}

/// The pod that a process has to belong to, and where its cgroup is read.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Owner {
    /// The pod.
    pub pod: PodUid,
    /// `/proc`.
    pub processes: Processes,
}

impl fmt::Display for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Named(paths) => {
                let paths: Vec<_> = paths.iter().map(|path| path.display().to_string()).collect();
                f.write_str(&paths.join(" or "))
            }
            Self::Beneath { directory, path } => write!(f, "{}", directory.join(path).display()),
        }
    }
}

impl fmt::Display for LibvirtAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.domain.as_deref().unwrap_or("the only domain"), self.socket)
    }
}

/// Why a text names no daemon that we can ask.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// Something else.
    #[error(
        "`{0}` is neither a libvirt URI (qemu:///system, qemu:///session, qemu+unix:///session?socket=/path) nor the path of a socket"
    )]
    Neither(String),
    /// Another machine's, or another hypervisor's.
    #[error(
        "`{0}` is not a QEMU daemon of this machine: run migvisor on the machine where the VM runs, with qemu:///system or qemu:///session"
    )]
    NotHere(String),
    /// A part that we do not know would be ignored, and something else asked than was meant.
    #[error("the URI's `{0}` is not understood: of its parameters only `socket` is")]
    Parameter(String),
    /// Nobody says where a session keeps its sockets.
    #[error("qemu:///session lies in $XDG_RUNTIME_DIR, which is not set: set it, or name the socket with ?socket=/path")]
    NoSession,
}

impl FromStr for Socket {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        if text.starts_with('/') {
            return Ok(Self::Named(vec![text.into()]));
        }
        let (scheme, rest) = text.split_once("://").ok_or_else(|| AddressError::Neither(text.to_owned()))?;
        let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
        if !matches!(scheme, "qemu" | "qemu+unix") || !matches!(place, "/system" | "/session") {
            return Err(AddressError::NotHere(text.to_owned()));
        }
        let mut socket = None;
        for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
            match parameter.split_once('=') {
                Some(("socket", path)) => socket = Some(percent_decode_str(path).decode_utf8_lossy().into_owned()),
                _ => return Err(AddressError::Parameter(parameter.to_owned())),
            }
        }
        let directory = match (socket, place) {
            (Some(path), _) if path.starts_with('/') => return Ok(Self::Named(vec![path.into()])),
            (Some(path), _) => return Err(AddressError::Parameter(format!("socket={path}"))),
            (None, "/system") => PathBuf::from("/run/libvirt"),
            (None, _) => session(|name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute()))?,
        };
        Ok(Self::Named(NAMES.iter().map(|name| directory.join(name)).collect()))
    }
}

/// libvirt's own rule: the session's runtime directory, else the user's cache.
fn session(variable: impl Fn(&str) -> Option<PathBuf>) -> Result<PathBuf, AddressError> {
    let cache = || variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")));
    let base = variable("XDG_RUNTIME_DIR").or_else(cache).ok_or(AddressError::NoSession)?;
    Ok(base.join("libvirt"))
}

impl Socket {
    /// The socket at this path below a directory.
    pub fn beneath(directory: impl AsRef<Path>, path: impl AsRef<Path>) -> Self {
        Self::Beneath { directory: directory.as_ref().to_owned(), path: path.as_ref().to_owned() }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn paths(text: &str) -> Vec<String> {
        match text.parse().unwrap() {
            Socket::Named(paths) => paths.into_iter().map(|path| path.display().to_string()).collect(),
            Socket::Beneath { .. } => vec![],
        }
    }

    #[test]
    fn uris_and_paths_are_read() {
        assert_eq!(paths("qemu:///system"), ["/run/libvirt/virtqemud-sock", "/run/libvirt/libvirt-sock"]);
        assert_eq!(paths("qemu+unix:///session?socket=/a%20b/c+d"), ["/a b/c+d"]);
        assert_eq!(paths("/run/x"), ["/run/x"]);
        let set = |name: &str| (name == "HOME").then(|| PathBuf::from("/home/ann"));
        assert_eq!(session(set), Ok("/home/ann/.cache/libvirt".into()));
        let set = |name: &str| Some(PathBuf::from("/x").join(name));
        assert_eq!(session(set), Ok("/x/XDG_RUNTIME_DIR/libvirt".into()));
        assert_eq!(session(|_| None), Err(AddressError::NoSession));
    }

    #[test]
    fn what_cannot_be_asked_is_refused_with_a_way_out() {
        for (text, says) in [
            ("vm1", "qemu:///system"),
            ("", "neither"),
            ("qemu+ssh://host/system", "on the machine where the VM runs"),
            ("qemu://host/system", "on the machine"),
            ("xen:///system", "not a QEMU daemon"),
            ("qemu:///embed?root=/x", "not a QEMU daemon"),
            ("qemu:///system?mode=legacy", "mode=legacy"),
            ("qemu:///system?socket=run/x", "socket=run/x"),
        ] {
            let error = text.parse::<Socket>().unwrap_err().to_string();
            assert!(error.contains(says), "{text}: {error}");
        }
    }
}
