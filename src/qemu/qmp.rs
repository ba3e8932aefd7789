//! A QMP client: newline JSON over a unix socket. In: a command and its arguments. Out: the reply, typed, or an error that
//! says what to do. Events that arrive in between are kept apart, in a bounded buffer.
//!
//! Every step has a time limit, every line a length limit. A future that is dropped in mid-command leaves the client usable:
//! a late reply is recognised by its `id` and skipped. Protocol: QEMU, `docs/interop/qmp-spec.rst`.

use std::{
    collections::VecDeque,
    fmt::{self, Display},
    os::fd::BorrowedFd,
    path::Path,
    time::Duration,
};

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Map, Value, json};
use tokio::{
    io::AsyncReadExt,
    net::unix::{OwnedReadHalf, OwnedWriteHalf},
    time::{Instant, timeout_at},
};

pub(crate) use super::error::plain;
pub use super::{error::QmpError, event::Event};
use super::{
    lines::LineBuffer,
    socket::{connect_to, send},
};

/// The longest line that is accepted, bytes. The longest real one (`query-qmp-schema`) has a few hundred kilobytes; once read, a
/// line can take thirty times its length.
pub const MAX_LINE: usize = 2 << 20;
/// So many events are kept; beyond, the oldest are dropped.
pub const MAX_EVENTS: usize = 1024;
/// So many bytes of them, as they came.
pub const MAX_EVENT_BYTES: usize = 1 << 20;

/// QEMU's version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
pub struct Version {
    /// 10 of 10.0.2.
    pub major: u32,
    /// 0 of 10.0.2.
    pub minor: u32,
    /// 2 of 10.0.2.
    pub micro: u32,
}

impl Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// One connection to one QEMU. QEMU serves one client per socket, so hold it no longer than needed.
#[derive(Debug)]
pub struct Qmp {
    reader: OwnedReadHalf,
    writer: OwnedWriteHalf,
    lines: LineBuffer,
    scratch: Box<[u8]>,
    /// Each with the length of its line.
    events: VecDeque<(usize, Event)>,
    event_bytes: usize,
    dropped_events: u64,
    last_id: u64,
    /// A command was cut off in the middle of being written: nothing sensible can follow it.
    cut_off: bool,
    timeout: Duration,
    version: Version,
    peer_pid: Option<i32>,
}

enum Message {
    Event(Event),
    Reply { id: Option<u64>, result: Result<Value, (String, String)> },
}

impl Qmp {
    /// Connects, reads the greeting, leaves the negotiation mode. `timeout` bounds this as a whole, and each command after it.
    pub async fn connect(path: &Path, timeout: Duration) -> Result<Self, QmpError> {
        let deadline = Instant::now() + timeout;
        let connect_error = |source| QmpError::Connect { path: path.to_owned(), source };
        let stream = match timeout_at(deadline, connect_to(path)).await {
            Ok(stream) => stream.map_err(connect_error)?,
            // A listener whose backlog is full: the same cause as a missing greeting.
            Err(_) => return Err(QmpError::Busy { path: path.to_owned(), waited: timeout }),
        };
        let peer_pid = stream.peer_cred().ok().and_then(|peer| peer.pid());
        let (reader, writer) = stream.into_split();
        let mut qmp = Self {
            reader,
            writer,
            lines: LineBuffer::new(MAX_LINE),
            scratch: vec![0; 64 << 10].into_boxed_slice(),
            events: VecDeque::new(),
            event_bytes: 0,
            dropped_events: 0,
            last_id: 0,
            cut_off: false,
            timeout,
            version: Version { major: 0, minor: 0, micro: 0 },
            peer_pid,
        };
        let greeting = qmp.read_line("(greeting)", deadline).await.map_err(|error| match error {
            QmpError::TimedOut { .. } => QmpError::Busy { path: path.to_owned(), waited: timeout },
            QmpError::Malformed { reason, .. } => QmpError::NotQmp { path: path.to_owned(), came: reason },
            QmpError::Closed { .. } => QmpError::NotQmp { path: path.to_owned(), came: "the end of the connection".to_owned() },
            other => other,
        })?;
        qmp.version =
            read_greeting(&greeting).ok_or_else(|| QmpError::NotQmp { path: path.to_owned(), came: excerpt(&greeting) })?;
        qmp.ask("qmp_capabilities", Value::Null, deadline).await?;
        Ok(qmp)
    }

    /// Asks, and waits for the reply for at most the time given to [`Qmp::connect`]. No arguments: `Value::Null` or `{}`.
    pub async fn execute<T: DeserializeOwned>(&mut self, command: &str, arguments: Value) -> Result<T, QmpError> {
        let deadline = Instant::now() + self.timeout;
        let value = self.ask(command, arguments, deadline).await?;
        serde_json::from_value(value).map_err(|error| QmpError::malformed(command, &error))
    }

    /// As [`Qmp::execute`], with a descriptor that goes along with the command (`getfd`): QEMU gets a duplicate of it.
    pub async fn execute_with_fd<T: DeserializeOwned>(
        &mut self,
        command: &str,
        arguments: Value,
        fd: BorrowedFd<'_>,
    ) -> Result<T, QmpError> {
        let deadline = Instant::now() + self.timeout;
        let value = self.ask_with(command, arguments, Some(fd), deadline).await?;
        serde_json::from_value(value).map_err(|error| QmpError::malformed(command, &error))
    }

    /// The next event, in the order of their arrival; `None` once the deadline has passed.
    pub async fn next_event(&mut self, deadline: Instant) -> Result<Option<Event>, QmpError> {
        loop {
            if let Some((length, event)) = self.events.pop_front() {
                self.event_bytes = self.event_bytes.saturating_sub(length);
                return Ok(Some(event));
            }
            match self.read_message("(event)", deadline).await {
                Ok((_, Message::Event(event))) => return Ok(Some(event)),
                Ok((_, Message::Reply { id, .. })) => self.check_stale(id, "(event)")?,
                Err(QmpError::TimedOut { .. }) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    /// QEMU's version, from its greeting.
    pub fn version(&self) -> Version {
        self.version
    }

    /// The process that listens on the socket, in our PID namespace. `None` where the kernel does not say, 0 never.
    pub fn peer_pid(&self) -> Option<i32> {
        self.peer_pid.filter(|pid| *pid > 0)
    }

    /// How many events were thrown away because nobody fetched them.
    pub fn dropped_events(&self) -> u64 {
        self.dropped_events
    }

    async fn ask(&mut self, command: &str, arguments: Value, deadline: Instant) -> Result<Value, QmpError> {
        self.ask_with(command, arguments, None, deadline).await
    }

    async fn ask_with(
        &mut self,
        command: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
        deadline: Instant,
    ) -> Result<Value, QmpError> {
        if self.cut_off {
            return Err(QmpError::malformed(command, &"an earlier command was cut off in the middle; connect anew"));
        }
        self.last_id = self.last_id.saturating_add(1);
        let mut message = Map::from_iter([("execute".to_owned(), json!(command)), ("id".to_owned(), json!(self.last_id))]);
        if !arguments.is_null() {
            message.insert("arguments".to_owned(), arguments);
        }
        let line = format!("{}\n", Value::Object(message));
        self.cut_off = true;
        match timeout_at(deadline, send(&mut self.writer, line.as_bytes(), fd)).await {
            Ok(written) => written.map_err(|_| QmpError::closed(command))?,
            Err(_) => return Err(QmpError::TimedOut { command: command.to_owned(), waited: self.timeout }),
        }
        self.cut_off = false;
        loop {
            match self.read_message(command, deadline).await? {
                (length, Message::Event(event)) => self.keep(length, event),
                // QEMU answers without an id where it could not read the command at all.
                (_, Message::Reply { id, result }) if id == Some(self.last_id) || (id.is_none() && result.is_err()) => {
                    return result.map_err(|why| refused(command, why));
                }
                (_, Message::Reply { id, .. }) => self.check_stale(id, command)?,
            }
        }
    }

    /// Keeps an event until somebody fetches it, and the latest ones rather than the oldest.
    fn keep(&mut self, length: usize, event: Event) {
        self.events.push_back((length, event));
        self.event_bytes = self.event_bytes.saturating_add(length);
        while self.events.len() > MAX_EVENTS || self.event_bytes > MAX_EVENT_BYTES {
            let Some((length, _)) = self.events.pop_front() else { break };
            self.event_bytes = self.event_bytes.saturating_sub(length);
            self.dropped_events = self.dropped_events.saturating_add(1);
        }
    }

    /// A reply to an earlier command, whose asker gave up, is skipped; any other is a fault.
    fn check_stale(&self, id: Option<u64>, command: &str) -> Result<(), QmpError> {
        match id {
            Some(id) if id <= self.last_id && id > 0 => Ok(()),
            _ => Err(QmpError::malformed(command, &format_args!("it replies to a command that was never asked (id {id:?})"))),
        }
    }

    /// A message and the length of its line.
    async fn read_message(&mut self, command: &str, deadline: Instant) -> Result<(usize, Message), QmpError> {
        let line = self.read_line(command, deadline).await?;
        Ok((line.len(), understand(command, &line)?))
    }

    /// Cancel-safe: what was read stays in the buffer.
    async fn read_line(&mut self, command: &str, deadline: Instant) -> Result<Vec<u8>, QmpError> {
        loop {
            match self.lines.next_line() {
                Ok(Some(line)) if line.iter().all(u8::is_ascii_whitespace) => continue,
                Ok(Some(line)) => return Ok(line),
                Ok(None) => {}
                Err(_) => return Err(QmpError::malformed(command, &format_args!("a line of more than {MAX_LINE} bytes"))),
            }
            let read = timeout_at(deadline, self.reader.read(&mut self.scratch))
                .await
                .map_err(|_| QmpError::TimedOut { command: command.to_owned(), waited: self.timeout })?
                .map_err(|_| QmpError::closed(command))?;
            match self.scratch.get(..read) {
                None | Some([]) => return Err(QmpError::closed(command)),
                Some(chunk) => self.lines.push(chunk),
            }
        }
    }
}

fn read_greeting(line: &[u8]) -> Option<Version> {
    #[derive(Deserialize)]
    struct Greeting {
        #[serde(rename = "QMP")]
        qmp: Body,
    }
    #[derive(Deserialize)]
    struct Body {
        version: Versions,
    }
    #[derive(Deserialize)]
    struct Versions {
        qemu: Version,
    }
    serde_json::from_slice::<Greeting>(line).ok().map(|greeting| greeting.qmp.version.qemu)
}

/// One message that has to be a reply: as libvirt hands it on, alone and under an id of its own.
pub(super) fn read_reply(command: &str, line: &[u8]) -> Result<Value, QmpError> {
    match understand(command, line)? {
        Message::Reply { result, .. } => result.map_err(|why| refused(command, why)),
        Message::Event(_) => Err(QmpError::malformed(command, &"an event came in its place")),
    }
}

fn refused(command: &str, (class, description): (String, String)) -> QmpError {
    QmpError::Refused { command: command.to_owned(), class: plain(&class), description: plain(&description) }
}

fn understand(command: &str, line: &[u8]) -> Result<Message, QmpError> {
    read_message(line).map_err(|reason| QmpError::malformed(command, &format_args!("{reason}: {}", excerpt(line))))
}

fn read_message(line: &[u8]) -> Result<Message, String> {
    #[derive(Deserialize)]
    struct Raw {
        event: Option<Value>,
        // Told apart from a missing key: `{"return": null}` is an answer.
        #[serde(default, rename = "return", deserialize_with = "present")]
        result: Option<Value>,
        error: Option<Failure>,
        #[serde(default)]
        id: Value,
    }
    #[derive(Deserialize)]
    struct Failure {
        #[serde(default)]
        class: String,
        #[serde(default)]
        desc: String,
    }
    fn present<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
        Value::deserialize(deserializer).map(Some)
    }
    let raw: Raw = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    match raw {
        Raw { result: Some(value), id, .. } => Ok(Message::Reply { id: id.as_u64(), result: Ok(value) }),
        Raw { error: Some(failure), id, .. } => {
            Ok(Message::Reply { id: id.as_u64(), result: Err((failure.class, failure.desc)) })
        }
        Raw { event: Some(_), .. } => serde_json::from_slice(line).map(Message::Event).map_err(|error| error.to_string()),
        _ => Err("neither a reply nor an event".to_owned()),
    }
}

/// The beginning of a line, fit for a message: one line, printable, short.
fn excerpt(line: &[u8]) -> String {
    const SHOWN: usize = 60;
    let head = line.get(..SHOWN).unwrap_or(line);
    let more = if line.len() > SHOWN { "…" } else { "" };
    format!("`{}{more}`", head.escape_ascii())
}

#[cfg(test)]
#[path = "qmp_tests.rs"]
mod tests;
