//! The way to one QEMU's monitor, whatever lies in between. In: an address, then commands. Out: typed replies and events.
//!
//! Everything above asks a [`Monitor`] and does not know whether a socket of QEMU's own answers or somebody who passes its words on.

use std::{fmt, os::fd::BorrowedFd, path::PathBuf, time::Duration};

use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::time::{Instant, sleep_until};

use super::{
    libvirt::{Libvirt, LibvirtAddress},
    qmp::{Event, Qmp, QmpError, Version},
};

/// Where a monitor is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Address {
    /// A QMP socket that nobody else holds.
    Qmp(PathBuf),
    /// A domain of a libvirt daemon, which holds the monitor and passes commands on.
    Libvirt(LibvirtAddress),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Qmp(path) => write!(f, "{}", path.display()),
            Self::Libvirt(address) => address.fmt(f),
        }
    }
}

impl From<PathBuf> for Address {
    fn from(path: PathBuf) -> Self {
        Self::Qmp(path)
    }
}

impl From<LibvirtAddress> for Address {
    fn from(address: LibvirtAddress) -> Self {
        Self::Libvirt(address)
    }
}

/// An open monitor. Hold it no longer than needed: QEMU serves one client per socket.
#[derive(Debug)]
pub struct Monitor {
    way: Way,
    address: Address,
    timeout: Duration,
}

#[derive(Debug)]
enum Way {
    Socket(Box<Qmp>),
    Libvirt(Box<Libvirt>),
}

impl Monitor {
    /// Opens it. `timeout` bounds this as a whole, and each command after it.
    pub async fn connect(address: &Address, timeout: Duration) -> Result<Self, QmpError> {
        let way = match address {
            Address::Qmp(path) => Way::Socket(Box::new(Qmp::connect(path, timeout).await?)),
            Address::Libvirt(address) => Way::Libvirt(Box::new(Libvirt::connect(address, timeout).await?)),
        };
        Ok(Self { way, address: address.clone(), timeout })
    }

    /// What it takes to open it again, once this one is closed.
    pub fn opened_by(&self) -> (Address, Duration) {
        (self.address.clone(), self.timeout)
    }

    /// Asks, and waits for the reply. No arguments: `Value::Null` or `{}`.
    pub async fn execute<T: DeserializeOwned>(&mut self, command: &str, arguments: Value) -> Result<T, QmpError> {
        match &mut self.way {
            Way::Socket(qmp) => qmp.execute(command, arguments).await,
            Way::Libvirt(libvirt) => libvirt.execute(command, arguments).await,
        }
    }

    /// As [`Monitor::execute`], with a descriptor that goes along (`getfd`): QEMU gets a duplicate of it.
    pub async fn execute_with_fd<T: DeserializeOwned>(
        &mut self,
        command: &str,
        arguments: Value,
        fd: BorrowedFd<'_>,
    ) -> Result<T, QmpError> {
        match &mut self.way {
            Way::Socket(qmp) => qmp.execute_with_fd(command, arguments, fd).await,
            Way::Libvirt(_) => {
                let reason = "libvirt passes no descriptor on through its bindings; ask `passes_descriptors` first".to_owned();
                Err(QmpError::Malformed { command: command.to_owned(), reason })
            }
        }
    }

    /// Can a descriptor go along with a command? libvirt has a call for it, its bindings have not.
    pub fn passes_descriptors(&self) -> bool {
        matches!(self.way, Way::Socket(_))
    }

    /// The next event, in the order of their arrival; `None` once the deadline has passed. libvirt passes none on.
    pub async fn next_event(&mut self, deadline: Instant) -> Result<Option<Event>, QmpError> {
        match &mut self.way {
            Way::Socket(qmp) => qmp.next_event(deadline).await,
            Way::Libvirt(_) => {
                sleep_until(deadline).await;
                Ok(None)
            }
        }
    }

    /// QEMU's version.
    pub fn version(&self) -> Version {
        match &self.way {
            Way::Socket(qmp) => qmp.version(),
            Way::Libvirt(libvirt) => libvirt.version(),
        }
    }

    /// QEMU's process, in our PID namespace; `None` where nobody says.
    pub fn peer_pid(&self) -> Option<i32> {
        match &self.way {
            Way::Socket(qmp) => qmp.peer_pid(),
            // Who listens is libvirt, not QEMU.
            Way::Libvirt(libvirt) => libvirt.pid(),
        }
    }
}
