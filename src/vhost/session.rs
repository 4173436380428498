//! Session of one front-end connection: executes messages and replies to them until the connection ends.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::channel::Channel;
use super::closing;
use super::config_change::FrontEnds;
use super::dispatch::dispatch;
use super::error::{Error, Refusal};
use super::handler::Handler;
use super::message::{Message, Reply};
use super::ownership::Ownership;
use super::peer::Peer;
use super::takeover::Owner;
use crate::engine::BlockBackend;
use crate::engine::stats::{DiskCell, StatsPage};
use crate::io::interrupt::PeerCall;
use crate::ratelimited_log;
use crate::reason::reason;

/// Pause between two attempts to lock the handler of a connection whose thread is busy.
const RETRY: Duration = Duration::from_millis(5);

/// Session of one front-end connection.
#[derive(Debug)]
pub struct Session {
    stream: Arc<UnixStream>,
    handler: Mutex<Handler>,
    /// Interrupts calls of the connection's thread that the front-end can block.
    calls: Arc<PeerCall>,
    /// Another front-end has taken the disk over, or the daemon ends.
    retired: AtomicBool,
    /// The front-end has handed its guest over to another by a migration.
    handed_over: AtomicBool,
    peer: Peer,
    backend: Arc<BlockBackend>,
}

/// Counts of messages, for the log.
#[derive(Debug, Default)]
struct Counts {
    messages: u64,
    refused: u64,
}

impl Session {
    /// Session over `stream`, which is in blocking mode. Adds the front-end to `front_ends`.
    pub fn new(
        stream: UnixStream,
        backend: Arc<BlockBackend>,
        front_ends: &FrontEnds,
    ) -> Arc<Self> {
        let peer = Peer::of(&stream);
        let stream = Arc::new(stream);
        let calls = Arc::new(PeerCall::default());
        backend.stats().count(DiskCell::Connections);
        let handler = Handler::new(backend.clone(), front_ends, stream.clone(), &calls);
        Arc::new(Self {
            handler: Mutex::new(handler),
            stream,
            calls,
            retired: AtomicBool::new(false),
            handed_over: AtomicBool::new(false),
            peer,
            backend,
        })
    }

    /// Serves messages until the front-end disconnects, breaks the protocol, or loses the disk to another.
    /// Then stops its queues.
    ///
    /// # Errors
    ///
    /// The error that ended the connection; none if the front-end disconnected.
    pub fn serve(self: &Arc<Self>, ownership: &Ownership) -> Result<(), Error> {
        let mut counts = Counts::default();
        let result = self.serve_messages(ownership, &mut counts);
        self.hang_up();
        self.lock().retire();
        // After the queues have stopped: a front-end that sees the end of the stream may take the used
        // index for final. close(2) would not end the stream, because other processes may hold the socket.
        let _ = self.stream.shutdown(Shutdown::Both);
        let had_disk = ownership.give_back(self);
        self.log_end(had_disk, &result, &counts);
        let leftover = self.lock().leftover();
        closing::close(leftover, &self.calls);
        result
    }

    fn serve_messages(
        self: &Arc<Self>,
        ownership: &Ownership,
        counts: &mut Counts,
    ) -> Result<(), Error> {
        let channel = Channel::new(self.stream.clone(), self.calls.clone());
        let channel = channel.map_err(Error::Setup)?;
        while let Some(mut message) = channel.receive()? {
            counts.messages += 1;
            let served = self.serve_message(&channel, ownership, &mut message, counts);
            closing::close(message.files, &self.calls);
            served?;
        }
        match self.is_retired() {
            true => Err(Error::TakenOver),
            false => Ok(()),
        }
    }

    /// Executes one message, and replies to it.
    fn serve_message(
        self: &Arc<Self>,
        channel: &Channel,
        ownership: &Ownership,
        message: &mut Message,
        counts: &mut Counts,
    ) -> Result<(), Error> {
        let mut handler = self.lock();
        if handler.is_retired() {
            return Err(Error::TakenOver);
        }
        let mut outcome = dispatch(&mut handler, message);
        if outcome.is_ok() && handler.wants_disk() {
            drop(handler);
            ownership.give(self)?;
            handler = self.lock();
            outcome = handler.take_disk().and(outcome);
            self.log_start(&handler);
        }
        let handed_over = handler.has_handed_over();
        self.handed_over.store(handed_over, Ordering::Release);
        drop(handler);
        // Reply even if REPLY_ACK was not acknowledged: the front-end waits, and may have acknowledged it
        // on an earlier connection.
        let replies = message.wants_reply;
        let request = message.request;
        match outcome {
            Ok(Some(reply)) => channel.send(request, &reply)?,
            Ok(None) if replies => channel.send(request, &Reply::number(0))?,
            Ok(None) => {}
            Err(refusal) if replies && !matches!(refusal, Refusal::Unknown) => {
                counts.refused += 1;
                let name = &self.peer;
                ratelimited_log::warn(format_args!(
                    "{name}: refused request {request}: {}",
                    reason(&refusal)
                ));
                channel.send(request, &Reply::number(1))?;
            }
            Err(source) => return Err(Error::Refused { request, source }),
        }
        Ok(())
    }

    /// Ends the connection: its thread reads the end of the stream. The front-end sees the end once the
    /// queues are drained.
    pub fn hang_up(&self) {
        // It fails if the stream is closed already.
        let _ = self.stream.shutdown(Shutdown::Read);
    }

    /// Ends the connection, and drains and stops its queues. Does not wait for the front-end.
    pub fn retire(&self) {
        self.retired.store(true, Ordering::Release);
        self.hang_up();
        loop {
            match self.handler.try_lock() {
                Ok(mut handler) => break handler.retire(),
                Err(TryLockError::Poisoned(handler)) => break handler.into_inner().retire(),
                Err(TryLockError::WouldBlock) => {
                    self.interrupt();
                    thread::sleep(RETRY);
                }
            }
        }
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Whether another front-end has taken the disk over, or the daemon ends.
    pub fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Acquire)
    }

    /// Interrupts a call of the connection's thread that the front-end blocks. The caller repeats this
    /// until the thread has ended.
    pub fn interrupt(&self) {
        self.calls.interrupt();
    }

    /// Returns the front-end as the owner of the disk, for the takeover policy.
    pub fn as_owner(&self) -> Owner<'_> {
        let mut stream = [PollFd::new(&*self.stream, PollFlags::RDHUP)];
        Owner {
            peer: &self.peer,
            // Its thread may not have read the end of the stream yet.
            disconnected: poll(&mut stream, Some(&Timespec::default()))
                .is_ok_and(|ready| ready > 0),
            handed_over: self.handed_over.load(Ordering::Acquire),
        }
    }

    /// Returns the process of the front-end.
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// Logs that this front-end takes the disk over from another.
    pub fn announce_takeover(&self, other: &Session) {
        let (name, other) = (&self.peer, &other.peer);
        ratelimited_log::info(format_args!(
            "{name} starts a queue and takes over the disk from the {other}"
        ));
    }

    /// Returns the statistics of the disk.
    pub fn stats(&self) -> &StatsPage {
        self.backend.stats()
    }

    fn log_start(&self, handler: &Handler) {
        let (name, features) = (&self.peer, handler.features());
        self.stats().set(DiskCell::FrontEndFeatures, features);
        ratelimited_log::info(format_args!(
            "{name} uses the disk, with features {features:#x}"
        ));
    }

    fn log_end(&self, had_disk: bool, result: &Result<(), Error>, counts: &Counts) {
        let name = &self.peer;
        let Counts { messages, refused } = counts;
        match result {
            Err(Error::TakeoverRefused { .. }) => self.stats().count(DiskCell::TakeoversRefused),
            Ok(()) | Err(Error::TakenOver) => {}
            Err(_) => self.stats().count(DiskCell::FrontEndErrors),
        }
        match result {
            Ok(()) if had_disk => ratelimited_log::info(format_args!(
                "{name} disconnected after {messages} messages, {refused} of them refused"
            )),
            Ok(()) => log::debug!("{name} disconnected after {messages} messages"),
            Err(Error::TakenOver) => ratelimited_log::info(format_args!(
                "{name} was disconnected after {messages} messages, {refused} of them refused"
            )),
            Err(error) => ratelimited_log::warn(format_args!(
                "{name}: dropped the connection after {messages} messages: {}",
                reason(error)
            )),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Handler> {
        self.handler.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
