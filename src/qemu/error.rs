//! Why a QEMU did not answer, in words that say what to do next; the same over a socket of its own and through libvirt.

use std::{fmt::Display, io, path::PathBuf, time::Duration};

use super::libvirt::LibvirtError;

/// QEMU's words as they may stand in a log, a status or a terminal: short, and without control characters.
pub(crate) fn plain(words: &str) -> String {
    words.chars().take(400).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Why QEMU did not answer.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The socket is missing, not a socket, nobody listens, or it is not ours to open.
    #[error("cannot connect to the QMP socket {}: {source}; check that the path is right and that the VM still runs", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Somebody listens there, but it speaks another language.
    #[error("{} is not a QMP socket: instead of QEMU's greeting came {came}; name the socket given to QEMU's -qmp option", path.display())]
    NotQmp {
        /// The socket.
        path: PathBuf,
        /// The beginning of what came.
        came: String,
    },
    /// Connected, but no greeting: QEMU serves one client per monitor.
    #[error(
        "{} does not greet within {waited:?}: another client probably holds this monitor (QEMU serves one at a time); \
         end that client or give QEMU a second -qmp socket", path.display()
    )]
    Busy {
        /// The socket.
        path: PathBuf,
        /// How long the greeting was waited for.
        waited: Duration,
    },
    /// QEMU is there and does not answer.
    #[error("QEMU did not answer `{command}` within {waited:?}: its main loop may be stuck; try again, or with more time")]
    TimedOut {
        /// What was asked.
        command: String,
        /// For how long.
        waited: Duration,
    },
    /// The connection ended.
    #[error("QEMU closed the monitor while `{command}` was under way: the VM has probably ended")]
    Closed {
        /// What was asked.
        command: String,
    },
    /// QEMU said no.
    #[error("QEMU refused `{command}`: {description} ({class})")]
    Refused {
        /// What was asked.
        command: String,
        /// QEMU's error class, mostly `GenericError`.
        class: String,
        /// QEMU's words.
        description: String,
    },
    /// What came is no QMP.
    #[error("QEMU's answer to `{command}` makes no sense: {reason}")]
    Malformed {
        /// What was asked.
        command: String,
        /// What is wrong.
        reason: String,
    },
    /// QEMU is asked through libvirt, and that failed.
    #[error(transparent)]
    Libvirt(#[from] LibvirtError),
}

impl QmpError {
    pub(super) fn malformed(command: &str, reason: &dyn Display) -> Self {
        Self::Malformed { command: command.to_owned(), reason: reason.to_string() }
    }

    pub(super) fn closed(command: &str) -> Self {
        Self::Closed { command: command.to_owned() }
    }
}
