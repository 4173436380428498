//! What a worker is started with.

use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use vmm_sys_util::eventfd::EventFd;

use super::Disk;
use crate::virtio::dirty_log::DirtyLog;
use crate::virtio::inflight::InflightArea;
use crate::virtio::memory::Memory;
use crate::virtio::queue::RingAddresses;

/// What all workers of a front-end stand on.
#[derive(Clone, Debug)]
pub struct ConnectionContext {
    /// The device.
    pub disk: Arc<Disk>,
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
    /// Whether the front-end cut a file under us: guest memory, in-flight area or log.
    pub fn is_lost(&self) -> bool {
        self.memory.is_lost()
            || self.inflight.as_ref().is_some_and(|area| area.is_lost())
            || self.memory.log().is_some_and(DirtyLog::is_lost)
    }
}

/// The descriptors a front-end gives a queue.
#[derive(Clone, Debug, Default)]
pub struct Eventfds {
    /// Written by the driver: there are requests. Without one, the ring is polled.
    pub kick: Option<Arc<File>>,
    /// Written by us: there are answers.
    pub call: Option<Arc<File>>,
    /// Written by us: the queue broke.
    pub error: Option<Arc<File>>,
}

impl Eventfds {
    /// Tells the driver that there are answers.
    pub fn signal_call(&self) {
        signal(self.call.as_deref());
    }

    /// Tells the front-end that the queue is broken.
    pub fn signal_error(&self) {
        signal(self.error.as_deref());
    }
}

fn signal(eventfd: Option<&File>) {
    if let Some(mut eventfd) = eventfd {
        // The counter at its limit is a signal nobody took yet; other errors are the peer's.
        let _ = eventfd.write(&1u64.to_le_bytes());
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

/// How a worker is asked to end.
#[derive(Debug)]
pub struct Stop {
    /// Set before the event.
    pub asked: AtomicBool,
    /// Wakes a sleeping worker.
    pub event: EventFd,
}
