//! Child processes that cannot outlive us: killed on drop, also when a test panics, and by the kernel when this process
//! is killed outright.
//!
//! In: a command. Out: a [`Process`] whose output goes to a file, to be shown when something goes wrong.
//!
//! The kernel's part is `setpriv --pdeathsig KILL`. That signal comes when the *thread* that started the child ends, not the
//! process, and every test runs in a thread of its own. So all children are started by one thread, `e2e-spawner`, which
//! lives as long as the process does.

use std::{
    collections::VecDeque,
    ffi::OsStr,
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{LazyLock, mpsc},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// A start wanted, and where the child goes.
type Order = (Command, mpsc::Sender<io::Result<Child>>);

/// Never dropped, so the thread behind it lives until the process ends.
static SPAWNER: LazyLock<mpsc::Sender<Order>> = LazyLock::new(|| {
    let (orders, inbox) = mpsc::channel::<Order>();
    #[expect(clippy::expect_used, reason = "a machine that cannot start a thread cannot run a test")]
    std::thread::Builder::new()
        .name("e2e-spawner".to_owned())
        .spawn(move || {
            for (mut command, answer) in inbox {
                // Whoever asked may be gone: then the child is dropped here and its guard with it.
                if let Err(mpsc::SendError(Ok(mut orphan))) = answer.send(command.spawn()) {
                    let _ = orphan.kill();
                    let _ = orphan.wait();
                }
            }
        })
        .expect("the thread that starts child processes");
    orders
});

/// Starts a command from the long-lived thread, so that `--pdeathsig` means the process and not the test's thread.
pub fn spawn_from_long_lived_thread(command: Command) -> io::Result<Child> {
    let (answer, child) = mpsc::channel();
    let gone = || io::Error::other("the thread that starts child processes has ended");
    SPAWNER.send((command, answer)).map_err(|_| gone())?;
    child.recv().map_err(|_| gone())?
}

/// A command that dies with this process, whatever becomes of it: add arguments and environment, then hand it to
/// [`Process::start`] or [`spawn_from_long_lived_thread`].
pub fn dying_with_us(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program).stdin(Stdio::null());
    command
}

/// A running child process, ended on drop.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts the command (made by [`dying_with_us`]) with its output in the file `log`.
    pub fn start(name: &str, mut command: Command, log: PathBuf) -> Result<Self> {
        let output = File::create(&log).with_context(|| format!("cannot write the log of {name}, {}", log.display()))?;
        command.stdout(output.try_clone()?).stderr(output);
        let child = spawn_from_long_lived_thread(command).with_context(|| {
            format!("cannot start {name}: is `setpriv` (util-linux) on PATH? `make setup` installs what is needed")
        })?;
        Ok(Self { name: name.to_owned(), child, log })
    }

    /// What the process is called in messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The file that holds its output, both streams.
    pub fn log_file(&self) -> &Path {
        &self.log
    }

    /// Its whole output so far.
    pub fn log(&self) -> String {
        std::fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// The last lines of its output.
    pub fn log_tail(&self, lines: usize) -> String {
        tail(&self.log, lines).unwrap_or_else(|error| format!("(no log: {error})"))
    }

    /// How it ended, if it has.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// An error with the log's tail, if it has ended.
    pub fn still_runs(&mut self) -> Result<()> {
        match self.exited() {
            None => Ok(()),
            Some(status) => bail!("{} ended by itself ({status}); its last words:\n{}", self.name, self.log_tail(25)),
        }
    }

    /// Sends a signal: SIGTERM to ask, SIGKILL for a crash, SIGSTOP for a hang.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.id()).context("a process id beyond i32")?;
        kill(Pid::from_raw(pid), signal).with_context(|| format!("cannot send {signal} to {}", self.name))
    }

    /// Ends it at once (SIGKILL) and waits until it is gone, its ports and files with it.
    pub fn kill(&mut self) {
        // Both fail only where it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Asks it to end (SIGTERM) and waits; an error with the log's tail if it has not ended by the deadline.
    pub async fn stop(mut self, deadline: Duration) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        let end = Instant::now() + deadline;
        while Instant::now() < end {
            if let Some(status) = self.exited() {
                return Ok(status);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        bail!("{} did not end within {deadline:?} of SIGTERM; its last words:\n{}", self.name, self.log_tail(25))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The last lines of a file that may be large: only its end is read.
fn tail(path: &Path, lines: usize) -> io::Result<String> {
    const WINDOW: u64 = 64 * 1024;
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(WINDOW)))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let mut last = VecDeque::new();
    for line in text.lines() {
        last.push_back(line);
        if last.len() > lines {
            last.pop_front();
        }
    }
    Ok(Vec::from(last).join("\n"))
}
