//! A child process that cannot outlive us: it is killed when its value is dropped, and by the kernel when we die.

use std::{
    process::{Child, Command},
    sync::{OnceLock, mpsc},
    thread,
};

use anyhow::{Context, Result, anyhow};

const NICE: &str = "-15";

/// Killed, and waited for, on drop.
#[derive(Debug)]
pub(super) struct Process {
    child: Child,
}

type Request = (Command, mpsc::SyncSender<std::io::Result<Child>>);

/// The kernel sends the parent-death signal when the *thread* that spawned the child ends, and test threads end early. So
/// one thread, which lives as long as the process, spawns everything.
fn spawner() -> &'static mpsc::Sender<Request> {
    static SPAWNER: OnceLock<mpsc::Sender<Request>> = OnceLock::new();
    SPAWNER.get_or_init(|| {
        let (sender, requests) = mpsc::channel::<Request>();
        thread::spawn(move || {
            for (mut command, answer) in requests {
                let _ = answer.send(command.spawn());
            }
        });
        sender
    })
}

impl Process {
    /// Starts `program`; `prepare` sets its arguments, streams and directory.
    pub(super) fn start(program: &str, prepare: impl FnOnce(&mut Command)) -> Result<Self> {
        // `nice` goes on without the right to it. A session of its own: see `favour`.
        let mut command = Command::new("nice");
        command.args(["-n", NICE, "setsid", "setpriv", "--pdeathsig", "KILL", program]);
        prepare(&mut command);
        let (answer, spawned) = mpsc::sync_channel(1);
        spawner().send((command, answer)).map_err(|_| anyhow!("the spawning thread has ended"))?;
        let child = spawned.recv()?.with_context(|| format!("starting {program} through setpriv (util-linux)"))?;
        Ok(Self { child })
    }

    /// What else runs on the machine shall not show in the figures. The kernel shares CPUs among sessions first, so the
    /// priority of the process alone does little; to be called once the program itself runs. Does nothing without the right.
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

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}
