//! One queue as the front-end describes it, message by message, and its worker while it runs.

use std::fs::File;
use std::sync::Arc;

use crate::engine::ratelimited_log;
use crate::engine::setup::{ConnectionContext, Eventfds, QueueSetup};
use crate::engine::worker::{Resume, Worker};
use crate::virtio::memory::Memory;
use crate::virtio::queue::RingAddresses;

/// Ring addresses as SET_VRING_ADDR gives them: in the front-end's own address space.
#[derive(Clone, Copy, Debug)]
pub struct UserRings {
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring.
    pub available: u64,
    /// Used ring.
    pub used: u64,
    /// Guest address under which writes to the used ring are logged, if they are.
    pub used_log: Option<u64>,
}

impl UserRings {
    fn translate(&self, memory: &Memory) -> Option<RingAddresses> {
        Some(RingAddresses {
            descriptors: memory.user_to_guest(self.descriptors)?,
            available: memory.user_to_guest(self.available)?,
            used: memory.user_to_guest(self.used)?,
            used_log: self.used_log.map(vm_memory::GuestAddress),
        })
    }
}

/// A queue's state.
#[derive(Debug, Default)]
pub struct Vring {
    /// Number of descriptors; 0 until set.
    pub size: u16,
    /// Where its parts lie.
    pub rings: Option<UserRings>,
    /// Available index to start from; without one the used ring tells.
    pub base: Option<u16>,
    /// Descriptors for kick, call and error.
    pub eventfds: Eventfds,
    /// A kick descriptor came, and no GET_VRING_BASE since.
    pub started: bool,
    /// SET_VRING_ENABLE said so, or need not.
    pub enabled: bool,
    worker: Option<Worker>,
}

impl Vring {
    /// Whether a worker is running.
    pub fn is_running(&self) -> bool {
        self.worker.is_some()
    }

    /// Starts a worker, if the front-end said all that one needs.
    pub fn start(&mut self, index: u16, context: &ConnectionContext) {
        let Some(rings) = self.rings else { return };
        if !self.started || !self.enabled || self.size == 0 || self.is_running() {
            return;
        }
        let Some(rings) = rings.translate(&context.memory) else {
            ratelimited_log::error(format_args!(
                "queue {index}: its rings are not in the memory the front-end shares"
            ));
            self.eventfds.signal_error();
            return;
        };
        let setup = QueueSetup {
            index,
            size: self.size,
            rings,
            base: self.base,
            eventfds: self.eventfds.clone(),
        };
        match Worker::start(setup, context.clone()) {
            Ok(worker) => self.worker = Some(worker),
            Err(error) => {
                ratelimited_log::error(format_args!("queue {index}: no worker: {error}"));
                self.eventfds.signal_error();
            }
        }
    }

    /// Drains and ends the worker, if one runs; the queue can go on later where it stopped.
    pub fn stop(&mut self) {
        if let Some(worker) = self.worker.take() {
            match worker.stop() {
                Resume::At(next) => self.base = Some(next),
                Resume::AsBefore => {}
                Resume::AtUsedIndex => self.base = None,
            }
        }
    }

    /// Asks the worker to end, without waiting: many can drain at the same time.
    pub fn begin_stop(&self) {
        if let Some(worker) = &self.worker {
            worker.begin_stop();
        }
    }

    /// Takes a descriptor a front-end sent.
    pub fn eventfd(file: Option<File>) -> Option<Arc<File>> {
        file.map(Arc::new)
    }
}
