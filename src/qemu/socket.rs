//! The unix socket under QMP: connecting beyond the length of `sun_path`, and sending a descriptor along.

use std::{
    fs::File,
    io::{self, IoSlice},
    os::fd::{AsRawFd, BorrowedFd},
    path::Path,
};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use tokio::{
    io::{AsyncWriteExt, Interest},
    net::{UnixStream, unix::OwnedWriteHalf},
};

/// `sun_path` holds 108 bytes, the last of which is the terminator.
const MAX_SOCKET_PATH: usize = 107;

/// Writes it all; the descriptor goes with the first byte.
pub(super) async fn send(writer: &mut OwnedWriteHalf, line: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let Some(fd) = fd else { return writer.write_all(line).await };
    let fds = [fd.as_raw_fd()];
    let written = writer
        .as_ref()
        .async_io(Interest::WRITABLE, || {
            let socket = writer.as_ref().as_raw_fd();
            sendmsg::<()>(socket, &[IoSlice::new(line)], &[ControlMessage::ScmRights(&fds)], MsgFlags::MSG_NOSIGNAL, None)
                .map_err(io::Error::from)
        })
        .await?;
    writer.write_all(line.get(written..).unwrap_or_default()).await
}

/// Paths longer than `sun_path` go through the open parent directory.
pub(super) async fn connect_to(path: &Path) -> io::Result<UnixStream> {
    if path.as_os_str().len() <= MAX_SOCKET_PATH {
        return UnixStream::connect(path).await;
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the path names no file"));
    };
    let directory = File::open(parent)?;
    let short = Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string()).join(name);
    UnixStream::connect(short).await
}
