//! What a queue worker is started with.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::BlockBackend;
use crate::io::interrupt::PeerCall;
use crate::virtio::dirty_log::DirtyLog;
use crate::virtio::inflight::InflightArea;
use crate::virtio::memory::Memory;
use crate::virtio::queue::RingAddresses;

/// How long a queue that stops goes on with requests that may take long: discards of many ranges,
/// and reads of bytes that must be fetched. The next front-end is served when the queues have
/// stopped.
pub const GRACE: Duration = Duration::from_secs(5);

/// What all queue workers of a front-end connection share.
#[derive(Clone, Debug)]
pub struct ConnectionContext {
    /// The disk's block back-end.
    pub backend: Arc<BlockBackend>,
    /// The guest's memory.
    pub memory: Arc<Memory>,
    /// Where requests under way are noted, if the front-end keeps such notes.
    pub inflight: Option<Arc<InflightArea>>,
    /// Feature bits the front-end acknowledged.
    pub features: u64,
    /// The front-end's connection, ended when its memory is gone.
    pub hangup: Arc<UnixStream>,
}

impl ConnectionContext {
    /// Whether the front-end cut a file short that is mapped: guest memory, in-flight area or log.
    pub fn is_lost(&self) -> bool {
        self.memory.is_lost()
            || self.inflight.as_ref().is_some_and(|area| area.is_lost())
            || self.memory.log().is_some_and(DirtyLog::is_lost)
    }
}

/// The eventfds of a queue, which the front-end sent.
#[derive(Clone, Debug, Default)]
pub struct Eventfds {
    /// Written by the driver: there are requests. Without one, the ring is polled.
    pub kick: Option<Arc<File>>,
    /// Written by the device: there are answers.
    pub call: Option<Arc<File>>,
    /// Written by the device: the queue is broken.
    pub error: Option<Arc<File>>,
    /// The thread that writes them. A write blocks if the front-end fills the counter and clears
    /// `O_NONBLOCK`, which it shares.
    pub writer: Arc<PeerCall>,
}

impl Eventfds {
    /// The same eventfds, to be written by another thread.
    pub fn for_another_thread(&self) -> Self {
        Self {
            writer: Arc::default(),
            ..self.clone()
        }
    }

    /// Tells the driver that there are answers.
    pub fn signal_call(&self) {
        self.signal(self.call.as_deref());
    }

    /// Tells the front-end that the queue is broken.
    pub fn signal_error(&self) {
        self.signal(self.error.as_deref());
    }

    fn signal(&self, eventfd: Option<&File>) {
        if let Some(mut eventfd) = eventfd {
            let one = 1u64.to_le_bytes();
            // A counter at its limit is a signal that was not taken yet; an interrupted write is one
            // that blocks.
            let _ = self.writer.run(|| eventfd.write(&one));
        }
    }
}

/// What one worker needs besides its context.
#[derive(Debug)]
pub struct QueueSetup {
    /// The queue's number.
    pub index: u16,
    /// Its number of descriptors.
    pub size: u16,
    /// Where it lies.
    pub rings: RingAddresses,
    /// Where it starts; without it, where the used ring says.
    pub base: Option<u16>,
    /// Its descriptors.
    pub eventfds: Eventfds,
}

/// What follows the end of a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Another worker of the queue starts at once, and goes on with what is open in the in-flight
    /// region.
    Restart,
    /// The queue stops.
    Stop,
}

/// Request to a worker to end, from another thread.
#[derive(Debug)]
pub struct Stop {
    restarts: AtomicBool,
    asked: AtomicBool,
    /// Wakes a sleeping worker.
    event: EventFd,
}

impl Stop {
    /// A request that is not made yet.
    ///
    /// # Errors
    ///
    /// The process has no descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            restarts: AtomicBool::new(false),
            asked: AtomicBool::new(false),
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    /// Asks the worker to end, and wakes it.
    pub fn ask(&self, next: Next) {
        self.restarts
            .store(next == Next::Restart, Ordering::Relaxed);
        self.asked.store(true, Ordering::Release);
        // The flag is set; a counter at its limit wakes as well.
        let _ = self.event.write(1);
    }

    /// Whether the worker is asked to end.
    #[inline]
    pub fn is_asked(&self) -> bool {
        self.asked.load(Ordering::Acquire)
    }

    /// What follows the end of the worker.
    pub fn next(&self) -> Next {
        match self.restarts.load(Ordering::Relaxed) {
            true => Next::Restart,
            false => Next::Stop,
        }
    }

    /// Event that is readable once the worker is asked.
    pub fn event(&self) -> &EventFd {
        &self.event
    }
}
