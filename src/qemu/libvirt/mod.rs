//! A monitor through libvirt, for VMs whose own monitor libvirt holds, as KubeVirt's. In: the address of a domain, then QMP
//! commands. Out: what QEMU replied, with the same errors as over a socket of QEMU's own.
//!
//! The commands are passed on as they are (`virDomainQemuMonitorCommand`); libvirt notes in its log that somebody did so (`tainted:
//! custom-monitor`). Events do not come this way, and no descriptors go this way: the safe binding has no call for either.
//!
//! ```text
//! Libvirt ──command──▶ worker: a thread ──libvirt's calls──▶ relay: a task ──bytes──▶ door ──▶ the daemon's socket
//! ```
//!
//! A daemon that hangs costs whoever asks its time limit and nothing more: the relay is cut, the call returns, the thread ends.

mod address;
mod door;
pub use door::folder_beneath;
mod relay;
#[cfg(feature = "libvirt")]
mod worker;

use std::{io, sync::Arc, sync::LazyLock, time::Duration};

use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::{
    sync::Semaphore,
    time::{Instant, timeout_at},
};

pub use address::{AddressError, LibvirtAddress, Owner, Socket};

use super::{
    process::ProcessError,
    qmp::{MAX_LINE, QmpError, Version, read_reply},
};

/// So many threads are in libvirt's hands at most, whatever its daemons do.
pub const MAX_THREADS: usize = 32;

static LICENCES: LazyLock<Arc<Semaphore>> = LazyLock::new(|| Arc::new(Semaphore::new(MAX_THREADS)));

/// Why libvirt could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum LibvirtError {
    /// No socket, or nobody listens, or it is not ours to open.
    #[error(
        "cannot connect to libvirt at {path}: {source}; check that virtqemud (or libvirtd) runs, that the path is right and no part \
         of it a link where links are not followed, and that you may open it"
    )]
    Socket {
        /// Where it should be.
        path: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Something else is there.
    #[error("{path} is no socket: libvirt's is called virtqemud-sock or libvirt-sock (a link is not followed there)")]
    NotASocket {
        /// What was opened.
        path: String,
    },
    /// We cannot see who listens.
    #[error(
        "who listens at {path} cannot be told: let this container see the node's processes (hostPID), or look with --source page-sampling"
    )]
    Unseen {
        /// The socket.
        path: String,
    },
    /// Somebody else listens.
    #[error("{path} is not answered by the pod's own libvirt: {why}")]
    Impostor {
        /// The socket.
        path: String,
        /// Who does.
        why: ProcessError,
    },
    /// It was connected to, and did not let us in.
    #[error("libvirt does not let us in: {words}; it must serve QEMU, and let this user in without a password")]
    Open {
        /// libvirt's words.
        words: String,
    },
    /// Nothing came back.
    #[error(
        "libvirt did not answer within {waited:?}: its daemon may hang; look at its log, or restart it (VMs run on meanwhile)"
    )]
    Hangs {
        /// For how long.
        waited: Duration,
    },
    /// Too many wait already.
    #[error("{MAX_THREADS} requests to libvirt are under way and none ends: its daemons hang; look at their logs")]
    TooMany,
    /// The connection ended.
    #[error("the connection to libvirt ended: {words}; its daemon may have been restarted: try again")]
    Lost {
        /// libvirt's words.
        words: String,
    },
    /// No such domain, or it does not run.
    #[error("no domain `{name}` runs there: `virsh list` shows those that do")]
    NoDomain {
        /// The name.
        name: String,
    },
    /// Nothing runs there at all.
    #[error("no domain runs there: the VM is gone or still starting")]
    NothingRuns,
    /// More than one does.
    #[error("{count} domains run there ({names}): name the one that is meant (--domain)")]
    SeveralRun {
        /// How many.
        count: usize,
        /// The first few.
        names: String,
    },
    /// libvirt is busy with the domain.
    #[error(
        "libvirt is busy with this VM and passes nothing on: it is being migrated, saved or started; try again when that has ended"
    )]
    Locked,
    /// No descriptor goes this way.
    #[error(
        "`{command}` needs a file descriptor handed to QEMU, which is not possible through libvirt: give QEMU a socket that it can \
         open by its path instead"
    )]
    NoDescriptors {
        /// What was to be asked.
        command: String,
    },
    /// No thread to be had.
    #[error("cannot start a thread for libvirt: {source}")]
    Thread {
        /// What the kernel said.
        source: io::Error,
    },
    /// Built without it.
    #[error("this migvisor was built without libvirt: build it with the feature `libvirt`, or use --qmp")]
    NotBuilt,
}

/// Which domain, and where.
#[cfg_attr(not(feature = "libvirt"), expect(dead_code, reason = "nobody is there to read it"))]
struct Order {
    uri: String,
    domain: Option<String>,
    /// Look for the process by the domain's UUID.
    find_process: bool,
}

/// Why a command brought no reply.
#[derive(Debug)]
#[cfg_attr(not(feature = "libvirt"), expect(dead_code, reason = "nobody is there to fail"))]
enum Failure {
    /// The domain does not run any more.
    Ended,
    /// Another job of libvirt's holds it.
    Locked,
    /// The connection is gone.
    Lost(String),
    /// Anything else, in libvirt's words.
    Refused(String),
}

/// Who a domain is.
#[derive(Debug)]
struct Identity {
    pid: Option<i32>,
}

/// QEMU's own answer about itself.
#[derive(serde::Deserialize)]
struct VersionAnswer {
    qemu: Version,
}

/// An open domain.
#[derive(Debug)]
pub struct Libvirt {
    /// `None`: cut, since somebody waited for too long.
    line: Option<Line>,
    timeout: Duration,
    version: Version,
    identity: Identity,
}

#[derive(Debug)]
struct Line {
    worker: worker::Worker,
    // Its drop is what counts.
    _relay: relay::Relay,
}

impl Libvirt {
    /// Finds the daemon, checks who it is, opens the domain, asks QEMU for its version. `timeout` bounds this as a whole, and
    /// each command after it.
    pub async fn connect(address: &LibvirtAddress, timeout: Duration) -> Result<Self, QmpError> {
        if cfg!(not(feature = "libvirt")) {
            return Err(LibvirtError::NotBuilt.into());
        }
        let deadline = Instant::now() + timeout;
        let hangs = |_| LibvirtError::Hangs { waited: timeout };
        let connected = timeout_at(deadline, door::connect(address)).await.map_err(hangs)??;
        let licence = timeout_at(deadline, Arc::clone(&LICENCES).acquire_owned()).await;
        let licence = licence.map_err(|_| LibvirtError::TooMany)?.map_err(|_| LibvirtError::TooMany)?;
        let thread = |source| LibvirtError::Thread { source };
        let relay = relay::Relay::start(connected.stream).map_err(thread)?;
        let place = if connected.system { "system" } else { "session" };
        let order = Order {
            uri: format!("qemu+unix:///{place}?socket={}", relay.socket()),
            domain: address.domain.clone(),
            find_process: matches!(address.socket, Socket::Named(_)),
        };
        let (opened, opening) = tokio::sync::oneshot::channel();
        let worker = worker::Worker::start(order, licence, opened)?;
        // Where it does not open in time, relay and thread go with this future.
        let identity = timeout_at(deadline, opening).await.map_err(hangs)?;
        let identity = identity.map_err(|_| LibvirtError::Lost { words: "its thread ended".to_owned() })??;
        let version = Version { major: 0, minor: 0, micro: 0 };
        let mut libvirt = Self { line: Some(Line { worker, _relay: relay }), timeout, version, identity };
        libvirt.version = libvirt.ask::<VersionAnswer>("query-version", Value::Null, deadline).await?.qemu;
        Ok(libvirt)
    }

    /// Asks, and waits for the reply for at most the time given to [`Libvirt::connect`]; after a time-out nothing more can be
    /// asked. No arguments: `Value::Null` or `{}`.
    pub async fn execute<T: DeserializeOwned>(&mut self, command: &str, arguments: Value) -> Result<T, QmpError> {
        self.ask(command, arguments, Instant::now() + self.timeout).await
    }

    /// No descriptor goes this way (`virDomainQemuMonitorCommandWithFiles` is in the unsafe binding only): an error that says so.
    pub fn execute_with_fd<T>(&mut self, command: &str) -> Result<T, QmpError> {
        Err(LibvirtError::NoDescriptors { command: command.to_owned() }.into())
    }

    /// QEMU's version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// The one process that was started with the domain's UUID; `None` where there is no such one, or the daemon lies in a
    /// directory of somebody who is not trusted: then a UUID says nothing.
    pub fn pid(&self) -> Option<i32> {
        self.identity.pid
    }

    async fn ask<T: DeserializeOwned>(&mut self, command: &str, arguments: Value, deadline: Instant) -> Result<T, QmpError> {
        let closed = || QmpError::Closed { command: command.to_owned() };
        let line = self.line.as_ref().ok_or_else(closed)?;
        let words = if arguments.is_null() {
            json!({ "execute": command })
        } else {
            json!({ "execute": command, "arguments": arguments })
        };
        let reply = match timeout_at(deadline, line.worker.ask(words.to_string())).await {
            Ok(Ok(reply)) => reply,
            Ok(Err(_)) => return Err(closed()),
            Err(_) => {
                // The only way to get the thread back out of libvirt.
                self.line = None;
                return Err(QmpError::TimedOut { command: command.to_owned(), waited: self.timeout });
            }
        };
        let reply = reply.map_err(|failure| match failure {
            Failure::Ended => closed(),
            Failure::Locked => LibvirtError::Locked.into(),
            Failure::Lost(words) => LibvirtError::Lost { words }.into(),
            Failure::Refused(description) => {
                QmpError::Refused { command: command.to_owned(), class: "libvirt".to_owned(), description }
            }
        })?;
        if reply.len() > MAX_LINE {
            return Err(QmpError::malformed(command, &format_args!("a reply of more than {MAX_LINE} bytes")));
        }
        let value = read_reply(command, reply.as_bytes())?;
        serde_json::from_value(value).map_err(|error| QmpError::malformed(command, &error))
    }
}

/// What takes the worker's place where libvirt is not built in.
#[cfg(not(feature = "libvirt"))]
mod worker {
    use tokio::sync::{OwnedSemaphorePermit, oneshot};

    use super::{Failure, Identity, LibvirtError, Order};

    #[derive(Debug)]
    pub(super) enum Worker {}

    impl Worker {
        pub(super) fn start(
            _: Order,
            _: OwnedSemaphorePermit,
            _: oneshot::Sender<Result<Identity, LibvirtError>>,
        ) -> Result<Self, LibvirtError> {
            Err(LibvirtError::NotBuilt)
        }

        pub(super) fn ask(&self, _: String) -> oneshot::Receiver<Result<String, Failure>> {
            match *self {}
        }
    }
}

#[cfg(test)]
#[path = "../libvirt_tests.rs"]
mod tests;
