//! A string that can be cut. libvirt's calls block, some of them for ever where the daemon hangs, and cannot be told to give up.
//! So libvirt does not talk to the daemon but to us, and we pass every byte on; who has waited long enough drops the relay, both
//! ends close, and the call comes back with an error, its thread with it.
//!
//! In: a connection to the daemon. Out: a name under which libvirt, in this process and nowhere else, finds it, once.

use std::{
    io,
    os::{linux::net::SocketAddrExt, unix::net::SocketAddr},
    sync::atomic::{AtomicU64, Ordering},
};

use tokio::{
    io::copy_bidirectional_with_sizes,
    net::{UnixListener, UnixStream},
    task::JoinHandle,
};

/// What `sun_path` holds behind the zero that makes a name abstract. libvirt takes all of it for the name, zeros included.
const ABSTRACT_NAME: usize = 107;
const BUFFER: usize = 64 << 10;

/// Cut on drop.
#[derive(Debug)]
pub(super) struct Relay {
    name: String,
    task: JoinHandle<()>,
}

impl Relay {
    /// Waits for libvirt, then passes on. Nothing is put into a file system: what is killed leaves nothing behind.
    pub(super) fn start(mut daemon: UnixStream) -> io::Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let name = format!("migvisor-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let mut padded = name.clone().into_bytes();
        padded.resize(ABSTRACT_NAME, 0);
        let listener = std::os::unix::net::UnixListener::bind_addr(&SocketAddr::from_abstract_name(&padded)?)?;
        listener.set_nonblocking(true)?;
        let listener = UnixListener::from_std(listener)?;
        let task = tokio::spawn(async move {
            if let Ok(mut libvirt) = only_us(listener).await {
                // How it ends is told to libvirt by its end of the string.
                let _ = copy_bidirectional_with_sizes(&mut libvirt, &mut daemon, BUFFER, BUFFER).await;
            }
        });
        Ok(Self { name, task })
    }

    /// Where libvirt finds it: the `socket` of a URI.
    pub(super) fn socket(&self) -> String {
        format!("%40{}", self.name)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The first connection of this very process; anybody in our network namespace may knock.
async fn only_us(listener: UnixListener) -> io::Result<UnixStream> {
    let us = i32::try_from(std::process::id()).ok();
    loop {
        let (stream, _) = listener.accept().await?;
        if us.is_some() && stream.peer_cred().ok().and_then(|peer| peer.pid()) == us {
            return Ok(stream);
        }
    }
}
