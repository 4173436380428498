//! Parameters of a queue worker.
#![cfg_attr(not(test), warn(clippy::indexing_slicing))]

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

/// Time that a stopping queue spends on requests that may take long: discards of many ranges, and reads of
/// absent bytes. The next front-end waits until the queues have stopped.
pub const GRACE: Duration = Duration::from_secs(5);

/// State that all queue workers of a front-end connection share.
#[derive(Clone, Debug)]
pub struct ConnectionContext {
    /// The disk's block back-end.
    pub backend: Arc<BlockBackend>,
    /// Guest memory.
    pub memory: Arc<Memory>,
    /// In-flight area, if the front-end set one.
    pub inflight: Option<Arc<InflightArea>>,
    /// Acknowledged feature bits.
    pub features: u64,
    /// Connection of the front-end, which a worker ends if memory is lost.
    pub hangup: Arc<UnixStream>,
}

impl ConnectionContext {
    /// Whether the front-end truncated a mapped file: guest memory, in-flight area or dirty log.
    pub fn is_lost(&self) -> bool {
        self.memory.is_lost()
            || self.inflight.as_ref().is_some_and(|area| area.is_lost())
            || self.memory.log().is_some_and(DirtyLog::is_lost)
    }
}

/// Eventfds of a queue, which the front-end sent.
#[derive(Clone, Debug, Default)]
pub struct Eventfds {
    /// Signalled by the driver when there are requests. Without one, the ring is polled.
    pub kick: Option<Arc<File>>,
    /// Signalled by the device when there are answers.
    pub call: Option<Arc<File>>,
    /// Signalled by the device when the queue is broken.
    pub error: Option<Arc<File>>,
    /// Interrupts the thread that signals them. A write blocks if the front-end fills the counter and clears
    /// the shared flag `O_NONBLOCK`.
    pub writer: Arc<PeerCall>,
}

impl Eventfds {
    /// The same eventfds, for another thread to signal.
    pub fn for_another_thread(&self) -> Self {
        Self {
            writer: Arc::default(),
            ..self.clone()
        }
    }

    /// Signals the driver that there are answers.
    pub fn signal_call(&self) {
        self.signal(self.call.as_deref());
    }

    /// Signals the front-end that the queue is broken.
    pub fn signal_error(&self) {
        self.signal(self.error.as_deref());
    }

    fn signal(&self, eventfd: Option<&File>) {
        if let Some(mut eventfd) = eventfd {
            let one = 1u64.to_le_bytes();
            // The write fails if the counter is at its limit, which is an earlier signal not read yet, or if
            // it blocked and was interrupted.
            let _ = self.writer.run(|| eventfd.write(&one));
        }
    }
}

/// Parameters of one queue worker.
#[derive(Debug)]
pub struct QueueSetup {
    /// Number of the queue.
    pub index: u16,
    /// Number of descriptors.
    pub size: u16,
    /// Addresses of the rings.
    pub rings: RingAddresses,
    /// Available index to start from; `None` starts from the used index.
    pub base: Option<u16>,
    /// Eventfds.
    pub eventfds: Eventfds,
}

/// What follows the end of a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AfterStop {
    /// Another worker of the queue starts at once, and takes over the requests left open in the in-flight
    /// area.
    Restart,
    /// The queue stays stopped.
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
    pub fn ask(&self, after: AfterStop) {
        self.restarts
            .store(after == AfterStop::Restart, Ordering::Relaxed);
        self.asked.store(true, Ordering::Release);
        // It fails if the counter is at its limit, which wakes the worker too.
        let _ = self.event.write(1);
    }

    /// Whether the worker is asked to end.
    #[inline]
    pub fn is_asked(&self) -> bool {
        self.asked.load(Ordering::Acquire)
    }

    /// What follows the end of the worker.
    pub fn after(&self) -> AfterStop {
        match self.restarts.load(Ordering::Relaxed) {
            true => AfterStop::Restart,
            false => AfterStop::Stop,
        }
    }

    /// Event that is readable once the worker is asked.
    pub fn event(&self) -> &EventFd {
        &self.event
    }
}
