//! A QEMU as a child process: it cannot outlive us, and what else runs on the machine shall not show in its figures.

use std::process::{Child, Command};

use anyhow::{Context, Result};

use crate::process::spawn_from_long_lived_thread;

const NICE: &str = "-15";

/// Killed, and waited for, on drop.
#[derive(Debug)]
pub(super) struct Qemu {
    child: Child,
}

impl Qemu {
    /// Starts `program`; `prepare` sets its arguments, streams and directory.
    pub(super) fn start(program: &str, prepare: impl FnOnce(&mut Command)) -> Result<Self> {
        // `nice` goes on without the right to it. A session of its own: see `favour`.
        let mut command = Command::new("nice");
        command.args(["-n", NICE, "setsid", "setpriv", "--pdeathsig", "KILL", program]);
        prepare(&mut command);
        let child =
            spawn_from_long_lived_thread(command).with_context(|| format!("starting {program} through setpriv (util-linux)"))?;
        Ok(Self { child })
    }

    /// The kernel shares CPUs among sessions first, so the priority of the process alone does little; to be called once the
    /// program itself runs. Does nothing without the right.
    pub(super) fn favour(&self) {
        let _ = std::fs::write(format!("/proc/{}/autogroup", self.pid()), NICE);
    }

    /// `nice`, `setsid` and `setpriv` replace themselves, so this is the program's own.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Does it still run?
    pub(super) fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Ends it now.
    pub(super) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.kill();
    }
}
