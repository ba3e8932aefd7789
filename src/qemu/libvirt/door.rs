//! The daemon's socket: opened, looked at, and only then connected to. In: where it should be. Out: a connection, and who is at
//! its other end.
//!
//! What is opened is what is connected to, whatever becomes of the name meanwhile: the connection goes through `/proc/self/fd`,
//! which also is as short as `sun_path` wants it, however long the path.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{FileTypeExt, OpenOptionsExt},
    },
    path::Path,
};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use tokio::net::UnixStream;

use super::{LibvirtAddress, LibvirtError, Socket};

/// A connection to a daemon.
#[derive(Debug)]
pub(super) struct Connected {
    pub(super) stream: UnixStream,
    /// Whoever runs as root serves `qemu:///system`, everybody else `qemu:///session`.
    pub(super) system: bool,
}

/// Opens, checks, connects.
pub(super) async fn connect(address: &LibvirtAddress) -> Result<Connected, LibvirtError> {
    let path = || address.socket.to_string();
    let refused = |source| LibvirtError::Socket { path: path(), source };
    let socket = open(&address.socket).map_err(refused)?;
    if !File::from(socket.try_clone().map_err(refused)?).metadata().map_err(refused)?.file_type().is_socket() {
        return Err(LibvirtError::NotASocket { path: path() });
    }
    let stream = UnixStream::connect(format!("/proc/self/fd/{}", socket.as_raw_fd())).await.map_err(refused)?;
    let peer = stream.peer_cred().map_err(refused)?;
    if let Some(owner) = &address.owner {
        let pid = peer.pid().filter(|pid| *pid > 0).ok_or_else(|| LibvirtError::Unseen { path: path() })?;
        owner.processes.ensure_of(pid, &owner.pod).map_err(|why| LibvirtError::Impostor { path: path(), why })?;
    }
    Ok(Connected { stream, system: peer.uid() == 0 })
}

fn open(socket: &Socket) -> io::Result<OwnedFd> {
    match socket {
        Socket::Named(paths) => {
            let mut missing = io::Error::from(io::ErrorKind::NotFound);
            for path in paths {
                match File::options().read(true).custom_flags(OFlag::O_PATH.bits()).open(path) {
                    Ok(file) => return Ok(file.into()),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => missing = error,
                    Err(error) => return Err(error),
                }
            }
            Err(missing)
        }
        Socket::Beneath { directory, path } => {
            let directory = File::options().read(true).custom_flags(OFlag::O_DIRECTORY.bits()).open(directory)?;
            beneath(&directory, path)
        }
    }
}

/// A folder beneath another one, whose contents may be hostile: no link is followed on the way.
pub fn folder_beneath(directory: &Path, path: &Path) -> io::Result<OwnedFd> {
    let directory = File::options().read(true).custom_flags(OFlag::O_DIRECTORY.bits()).open(directory)?;
    resolve(&directory, path, OFlag::O_DIRECTORY)
}

fn beneath(directory: &File, path: &Path) -> io::Result<OwnedFd> {
    resolve(directory, path, OFlag::empty())
}

fn resolve(directory: &File, path: &Path, more: OFlag) -> io::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | more)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    loop {
        match openat2(directory, path, how) {
            // Somebody renames directories meanwhile: the kernel cannot tell whether it is still beneath.
            Err(nix::errno::Errno::EAGAIN) => {}
            Err(error) => return Err(error.into()),
            Ok(socket) => return Ok(socket),
        }
    }
}
