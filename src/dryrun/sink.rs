//! The end of the line: reads what QEMU sends at the pace of the line, counts it, forgets it, and never answers.
//!
//! In: a pace, how many connections. Out: what QEMU is to migrate to, how much came, and whether QEMU hung up. One thread and one
//! buffer, whatever QEMU does. When the [`Sink`] goes, by drop or with this process, every connection goes, and a
//! migration to it fails: the guest runs on.
//!
//! Nothing but QEMU's own bytes is between us and an end of the migration: a target that never says that all has arrived
//! (`MIG_RP_MSG_SHUT`) is one that QEMU never hands a guest over to.

use std::{
    collections::VecDeque,
    fs::{self, File},
    hash::{BuildHasher, Hasher, RandomState},
    io::{self, Read},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{
            fs::{FileTypeExt, OpenOptionsExt, PermissionsExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::OFlag,
    poll::{PollFd, PollFlags, PollTimeout, poll, ppoll},
    sys::{
        resource::{Resource, getrlimit},
        socket::{getsockopt, sockopt::PeerCredentials},
        time::TimeSpec,
    },
};

use super::pace::Pace;
use crate::model::units::BytesPerSecond;

/// What is read at once: at 100 MiB/s 0.6 ms.
const PIECE: usize = 64 << 10;
/// Whoever waits so long waits for QEMU, and not only for the processor.
const IDLE: Duration = Duration::from_micros(300);
/// Enough for the time between a sync and QEMU's answer: half a second of an unpaced line.
const ARRIVALS: usize = 16_384;

/// A sink at work. It hangs up when dropped.
#[derive(Debug)]
pub(super) struct Sink {
    seen: Arc<Seen>,
    /// Hanging this up wakes the thread and ends it.
    leash: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
    /// Where a listener is, to be taken away.
    socket: Option<PathBuf>,
}

#[derive(Debug, Default)]
struct Seen {
    bytes: AtomicU64,
    hung_up: AtomicBool,
    /// The last arrivals, the latest at the end.
    arrivals: Mutex<VecDeque<Arrival>>,
}

impl Seen {
    fn note(&self, awaited: Instant, length: usize) {
        let mut arrivals = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
        if arrivals.len() >= ARRIVALS {
            arrivals.pop_front();
        }
        let before = self.bytes.fetch_add(length as u64, Ordering::Relaxed);
        arrivals.push_back(Arrival { awaited, came: Instant::now(), before });
    }
}

/// One piece.
#[derive(Debug, Clone, Copy)]
struct Arrival {
    /// From then on it was waited for.
    awaited: Instant,
    /// Then it was there.
    came: Instant,
    /// Bytes before it.
    before: u64,
}

/// QEMU may be another user; whoever else comes is turned away. The folder may be a hostile pod's, which puts something else in the
/// place of the socket meanwhile: what is opened without following a link, and is a socket, is what is changed.
fn let_everybody_in(socket: &Path) -> io::Result<()> {
    let held = File::options().read(true).custom_flags((OFlag::O_PATH | OFlag::O_NOFOLLOW).bits()).open(socket)?;
    if !held.metadata()?.file_type().is_socket() {
        return Err(io::Error::other("somebody put something else in the place of our socket"));
    }
    fs::set_permissions(format!("/proc/self/fd/{}", held.as_raw_fd()), fs::Permissions::from_mode(0o666))
}

/// Where a listener is: the same folder, as two mount namespaces see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meeting {
    /// As we see it.
    pub ours: PathBuf,
    /// As QEMU sees it.
    pub theirs: PathBuf,
}

/// Whether a listener for so many connections would fit under this process's limit of open files, with some to spare for what else it does;
/// else how many it needs and how many there are. Where the kernel does not tell it is tried.
pub(super) fn fits(connections: u64) -> Result<(), (u64, u64)> {
    /// The listener, the leash, a look at a VM and a write to an API server meanwhile.
    const BESIDES: u64 = 24;
    let Ok((limit, _)) = getrlimit(Resource::RLIMIT_NOFILE) else { return Ok(()) };
    let open = fs::read_dir("/proc/self/fd").map_or(0, |files| files.count() as u64);
    let (needed, left) = (connections.saturating_add(BESIDES), limit.saturating_sub(open));
    if needed <= left { Ok(()) } else { Err((needed, left)) }
}

impl Sink {
    /// One connection that needs no path: the descriptor is QEMU's end of it. It dies with us.
    pub(super) fn pair(rate: Option<BytesPerSecond>) -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = UnixStream::pair()?;
        Ok((Self::start(rate, Lines { streams: vec![ours], listener: None })?, theirs.into()))
    }

    /// A listener for at most so many connections, of this process alone where it is known. Out: the path as QEMU sees it.
    pub(super) fn listen(
        rate: Option<BytesPerSecond>,
        meeting: &Meeting,
        connections: usize,
        peer: Option<i32>,
    ) -> io::Result<(Self, PathBuf)> {
        // Keyed at random: nobody can guess it.
        let name = format!("migvisor-dry-run-{:016x}", RandomState::new().build_hasher().finish());
        let socket = meeting.ours.join(&name);
        let listener = UnixListener::bind(&socket)?;
        let opened = let_everybody_in(&socket).and_then(|()| listener.set_nonblocking(true));
        let listener = Some(Listener { socket: listener, free: connections, peer });
        match opened.and_then(|()| Self::start(rate, Lines { streams: vec![], listener })) {
            Ok(mut sink) => {
                sink.socket = Some(socket);
                Ok((sink, meeting.theirs.join(name)))
            }
            Err(error) => {
                remove(&socket);
                Err(error)
            }
        }
    }

    fn start(rate: Option<BytesPerSecond>, mut lines: Lines) -> io::Result<Self> {
        let (leash, end) = UnixStream::pair()?;
        let seen = Arc::new(Seen::default());
        let noted = Arc::clone(&seen);
        let thread = thread::Builder::new().name("dry-run-sink".to_owned()).spawn(move || {
            // Whatever ends it, QEMU sees it as the end of the connection.
            let _ = lines.drain(rate, &noted, end.as_fd());
            noted.hung_up.store(true, Ordering::Release);
        })?;
        Ok(Self { seen, leash: Some(leash), thread: Some(thread), socket: None })
    }

    /// Bytes that came so far, over all connections.
    pub(super) fn bytes(&self) -> u64 {
        self.seen.bytes.load(Ordering::Relaxed)
    }

    /// How much QEMU has sent between `at`, not long ago, and now, when it says that it has sent `sent` in all. Where the time is not known
    /// better than that it was after `earliest`: if the line was idle then, all since.
    pub(super) fn since(&self, at: Instant, sent: u64, earliest: Option<Instant>) -> u64 {
        let arrivals = self.seen.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
        let at = earliest.filter(|earliest| next(&arrivals, *earliest).is_none_or(|next| next.idle(*earliest))).unwrap_or(at);
        let all = self.bytes();
        match next(&arrivals, at) {
            // Nothing was on its way: what QEMU has sent since is what had not come.
            Some(next) if next.idle(at) => sent.saturating_sub(next.before),
            // Something was, and as much is still: that makes no difference.
            Some(next) => all.saturating_sub(next.before),
            None => sent.saturating_sub(all),
        }
    }

    /// QEMU closed a connection: whatever migrates now, it is not to us.
    pub(super) fn hung_up(&self) -> bool {
        self.seen.hung_up.load(Ordering::Acquire)
    }
}

/// The first arrival after that moment.
fn next(arrivals: &VecDeque<Arrival>, at: Instant) -> Option<Arrival> {
    arrivals.get(arrivals.partition_point(|arrival| arrival.came <= at)).copied()
}

impl Arrival {
    /// Was the line empty at that moment, before this came?
    fn idle(self, at: Instant) -> bool {
        self.awaited <= at && self.came.duration_since(self.awaited) >= IDLE
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        // The other end of the leash is readable from now on: the thread ends within microseconds.
        self.leash = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        if let Some(socket) = &self.socket {
            remove(socket);
        }
    }
}

fn remove(socket: &Path) {
    // It is of no use any more, and of no harm where it stays.
    let _ = fs::remove_file(socket);
}

/// What the thread holds.
struct Lines {
    streams: Vec<UnixStream>,
    listener: Option<Listener>,
}

struct Listener {
    socket: UnixListener,
    free: usize,
    peer: Option<i32>,
}

impl Lines {
    /// Until the leash goes, or QEMU hangs up.
    fn drain(&mut self, rate: Option<BytesPerSecond>, seen: &Seen, leash: BorrowedFd<'_>) -> io::Result<()> {
        let mut piece = vec![0_u8; PIECE];
        let mut pace = rate.map(|rate| Pace::new(rate, Instant::now()));
        loop {
            let mut awaited = Instant::now();
            let Some(ready) = self.ready(leash)? else { return Ok(()) };
            for stream in self.streams.iter_mut().zip(&ready).filter_map(|(stream, ready)| ready.then_some(stream)) {
                let length = match stream.read(&mut piece) {
                    Ok(0) => return Ok(()),
                    Ok(length) => length,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) => return Err(error),
                };
                seen.note(awaited, length);
                awaited = Instant::now();
                if let Some(pace) = &mut pace
                    && !wait_until(pace.carry(length, Instant::now()), leash)?
                {
                    return Ok(());
                }
            }
            self.accept()?;
        }
    }

    /// Waits until something is to be read; `None` once the leash is gone.
    fn ready(&self, leash: BorrowedFd<'_>) -> io::Result<Option<Vec<bool>>> {
        let mut fds = vec![PollFd::new(leash, PollFlags::POLLIN)];
        fds.extend(self.streams.iter().map(|stream| PollFd::new(stream.as_fd(), PollFlags::POLLIN)));
        fds.extend(self.listener.iter().map(|one| PollFd::new(one.socket.as_fd(), PollFlags::POLLIN)));
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut any = fds.iter().map(|fd| fd.revents().is_some_and(|events| !events.is_empty()));
        if any.next() == Some(true) {
            return Ok(None);
        }
        Ok(Some(any.take(self.streams.len()).collect()))
    }

    fn accept(&mut self) -> io::Result<()> {
        let Some(listener) = &mut self.listener else { return Ok(()) };
        match listener.socket.accept() {
            Ok((stream, _)) => {
                let from = getsockopt(&stream, PeerCredentials)?.pid();
                if listener.free > 0 && listener.peer.is_none_or(|peer| peer == from) {
                    listener.free -= 1;
                    self.streams.push(stream);
                }
                if listener.free == 0 {
                    self.listener = None;
                }
                Ok(())
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Waits; `false` once the leash is gone. Timers of whole milliseconds would be too coarse for a piece.
fn wait_until(until: Instant, leash: BorrowedFd<'_>) -> io::Result<bool> {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left < Duration::from_micros(20) {
            return Ok(true);
        }
        let mut fds = [PollFd::new(leash, PollFlags::POLLIN)];
        match ppoll(&mut fds, Some(TimeSpec::from_duration(left)), None) {
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
    }
}
