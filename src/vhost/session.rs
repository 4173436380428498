//! Session of one front-end connection: its queues and its process, shared with the threads that may end it.

use std::fs::File;
use std::io;
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
use super::handler::Handler;
use super::peer::Peer;
use super::takeover::Owner;
use crate::engine::BlockBackend;
use crate::engine::stats::{DiskCell, StatsPage};
use crate::io::interrupt::PeerCall;
use crate::ratelimited_log;

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

    /// Receives the front-end's messages, and sends replies.
    ///
    /// # Errors
    ///
    /// Those of [`Channel::new`].
    pub(super) fn channel(&self) -> io::Result<Channel> {
        Channel::new(self.stream.clone(), self.calls.clone())
    }

    /// Closes descriptors that the front-end sent.
    pub(super) fn close(&self, files: impl IntoIterator<Item = File>) {
        closing::close(files, &self.calls);
    }

    /// Records whether the front-end has handed its guest over to another by a migration.
    pub(super) fn set_handed_over(&self, handed_over: bool) {
        self.handed_over.store(handed_over, Ordering::Release);
    }

    /// Stops the queues, then ends the connection, whose thread serves no more messages.
    pub(super) fn end(&self) {
        self.hang_up();
        self.lock().retire();
        // After the queues have stopped: a front-end that sees the end of the stream may take the used
        // index for final. close(2) would not end the stream, because other processes may hold the socket.
        let _ = self.stream.shutdown(Shutdown::Both);
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

    /// Locks the handler of the front-end's messages.
    pub(super) fn lock(&self) -> MutexGuard<'_, Handler> {
        self.handler.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
