//! The one place that calls libvirt. In: a URI, a domain's name, then commands. Out: replies. Its calls block, so they have a
//! thread of their own, which ends when nobody asks any more or when the relay is cut.
//!
//! libvirt's client believes the daemon, and we do not believe every daemon: only calls whose answers it takes apart with care are
//! made here. `virDomainMemoryStats`, for one, is not among them: it copies as many figures as the daemon sends into as many as
//! were asked for.

use std::{sync::mpsc, thread};

use tokio::sync::{OwnedSemaphorePermit, oneshot};
use virt::{
    connect::Connect,
    domain::Domain,
    error::{Error, ErrorNumber, clear_error_callback},
    sys,
};

use super::{Failure, Identity, LibvirtError, Order};
use crate::qemu::{process::Processes, qmp::plain};

/// So many names of domains are told in a message.
const TOLD: usize = 5;

/// A domain that is paused for one of these reasons is neither here nor there.
const HANDED_OVER: [i64; 2] = [sys::VIR_DOMAIN_PAUSED_MIGRATION as i64, sys::VIR_DOMAIN_PAUSED_STARTING_UP as i64];

/// One command and where its reply goes.
type Request = (String, oneshot::Sender<Result<String, Failure>>);

/// What is asked of the thread.
#[derive(Debug)]
pub(super) struct Worker(mpsc::Sender<Request>);

impl Worker {
    /// Starts a thread that opens the domain and tells who it is, then answers. `permit` is its licence to exist.
    pub(super) fn start(
        order: Order,
        permit: OwnedSemaphorePermit,
        opened: oneshot::Sender<Result<Identity, LibvirtError>>,
    ) -> Result<Self, LibvirtError> {
        let (requests, inbox) = mpsc::channel::<Request>();
        thread::Builder::new()
            .name("libvirt".to_owned())
            .spawn(move || {
                let _permit = permit;
                match open(&order) {
                    Err(error) => drop(opened.send(Err(error))),
                    Ok((_connection, domain, identity)) => {
                        if opened.send(Ok(identity)).is_ok() {
                            answer(&domain, &inbox);
                        }
                    }
                }
            })
            .map_err(|source| LibvirtError::Thread { source })?;
        Ok(Self(requests))
    }

    /// Hands a command to the thread; nobody receives on the other end where the thread has ended.
    pub(super) fn ask(&self, command: String) -> oneshot::Receiver<Result<String, Failure>> {
        let (reply, answer) = oneshot::channel();
        // A thread that has ended drops the request, and with it the sender that the caller waits for.
        let _ = self.0.send((command, reply));
        answer
    }
}

fn answer(domain: &Domain, inbox: &mpsc::Receiver<Request>) {
    for (command, reply) in inbox {
        // Who gave up before its turn came wants nothing done any more.
        if !reply.is_closed() {
            let _ = reply.send(domain.qemu_monitor_command(&command, 0).map_err(|error| failure(&error)));
        }
    }
}

/// A connection that closes itself: that of virt 0.4 does not.
struct Open(Connect);

impl Drop for Open {
    fn drop(&mut self) {
        // What was cut cannot take leave.
        let _ = self.0.close();
    }
}

fn open(order: &Order) -> Result<(Open, Domain, Identity), LibvirtError> {
    // libvirt would print every error to standard error besides.
    clear_error_callback();
    let connection = Connect::open(Some(&order.uri)).map(Open).map_err(|error| match error.code() {
        ErrorNumber::Rpc | ErrorNumber::SystemError => lost(&error),
        _ => LibvirtError::Open { words: words(&error) },
    })?;
    let domain = find(&connection.0, order.domain.as_deref())?;
    // The target of a migration, or a source in its last moments: libvirt would let us wait for half a minute and say no.
    if matches!(domain.get_state(), Ok((sys::VIR_DOMAIN_PAUSED, reason)) if HANDED_OVER.contains(&i64::from(reason))) {
        return Err(LibvirtError::Locked);
    }
    let uuid = domain.get_uuid_string().map_err(|error| lost(&error))?;
    let pid = order.find_process.then(|| Processes::default().qemu_with_uuid(&uuid)).flatten();
    Ok((connection, domain, Identity { pid }))
}

fn find(connection: &Connect, name: Option<&str>) -> Result<Domain, LibvirtError> {
    if let Some(name) = name {
        let missing = || LibvirtError::NoDomain { name: plain(name) };
        if name.contains('\0') {
            return Err(missing());
        }
        let domain = match Domain::lookup_by_name(connection, name) {
            Ok(domain) => domain,
            Err(error) if error.code() == ErrorNumber::NoDomain => return Err(missing()),
            Err(error) => return Err(lost(&error)),
        };
        return if domain.is_active().map_err(|error| lost(&error))? { Ok(domain) } else { Err(missing()) };
    }
    let mut domains = connection.list_all_domains(sys::VIR_CONNECT_LIST_DOMAINS_ACTIVE).map_err(|error| lost(&error))?;
    match (domains.pop(), domains.len()) {
        (None, _) => Err(LibvirtError::NothingRuns),
        (Some(domain), 0) => Ok(domain),
        (Some(domain), others) => {
            let names = domains.iter().chain([&domain]).take(TOLD);
            let names: Vec<_> = names.map(|domain| plain(&domain.get_name().unwrap_or_default())).collect();
            Err(LibvirtError::SeveralRun { count: others.saturating_add(1), names: names.join(", ") })
        }
    }
}

fn words(error: &Error) -> String {
    plain(error.message())
}

fn lost(error: &Error) -> LibvirtError {
    LibvirtError::Lost { words: words(error) }
}

fn failure(error: &Error) -> Failure {
    match error.code() {
        ErrorNumber::NoDomain | ErrorNumber::OperationInvalid => Failure::Ended,
        ErrorNumber::OperationTimeout => Failure::Locked,
        ErrorNumber::Rpc | ErrorNumber::SystemError => Failure::Lost(words(error)),
        _ => Failure::Refused(words(error)),
    }
}
