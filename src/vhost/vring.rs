//! Vring: one virtqueue as the front-end describes it in its messages, and the queue worker that serves
//! it.
#![cfg_attr(
    not(test),
    warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)
)]

use std::fs::File;
use std::sync::Arc;

use super::refusal::Refusal;
use crate::engine::setup::{AfterStop, ConnectionContext, Eventfds, QueueSetup};
use crate::engine::worker::{Resume, StartFailure, Worker};
use crate::io::interrupt::PeerCall;
use crate::ratelimited_log;
use crate::reason::reason;
use crate::virtio::inflight::InflightArea;
use crate::virtio::memory::Memory;
use crate::virtio::queue::{RingAddresses, start_index};

/// Ring addresses of SET_VRING_ADDR, in the address space of the front-end.
#[derive(Clone, Copy, Debug)]
pub struct UserRings {
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring.
    pub available: u64,
    /// Used ring.
    pub used: u64,
    /// Guest address at which writes to the used ring are logged; `None` if they are not.
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

/// One virtqueue of a front-end.
#[derive(Debug)]
pub struct Vring {
    /// Number of descriptors; 0 until set.
    size: u16,
    rings: Option<UserRings>,
    /// Available index to start from; `None` starts from the used ring.
    base: Option<u16>,
    eventfds: Eventfds,
    /// A kick descriptor came, and no GET_VRING_BASE since.
    started: bool,
    /// Set by SET_VRING_ENABLE, or by the features if the front-end need not send it.
    enabled: bool,
    state: State,
}

/// Whether a queue is served.
#[derive(Debug)]
enum State {
    Stopped,
    Running(Worker),
    /// It did not start, which was reported. The next change of the vring may let it start.
    Failed,
}

impl Vring {
    /// A vring without any description. `writer` is the thread of the connection.
    pub fn new(writer: Arc<PeerCall>) -> Self {
        Self {
            size: 0,
            rings: None,
            base: None,
            eventfds: Eventfds {
                writer,
                ..Eventfds::default()
            },
            started: false,
            enabled: false,
            state: State::Stopped,
        }
    }

    /// Sets the number of descriptors, which is a power of two.
    pub fn set_size(&mut self, size: u16) {
        self.size = size;
    }

    /// Sets the addresses of the rings.
    pub fn set_rings(&mut self, rings: UserRings) {
        self.rings = Some(rings);
    }

    /// Sets the available index to start from.
    pub fn set_base(&mut self, base: u16) {
        self.base = Some(base);
    }

    /// Enables or disables the queue.
    pub fn set_enabled(&mut self, enabled: bool) {
        self.enabled = enabled;
    }

    /// Sets the descriptor on which the driver kicks, which starts the queue. Without one, the ring is
    /// polled.
    pub fn set_kick(&mut self, kick: Option<Arc<File>>) {
        (self.eventfds.kick, self.started) = (kick, true);
    }

    /// Sets the descriptor on which the driver is interrupted.
    pub fn set_call(&mut self, call: Option<Arc<File>>) {
        self.eventfds.call = call;
    }

    /// Sets the descriptor on which a broken queue is reported.
    pub fn set_error(&mut self, error: Option<Arc<File>>) {
        self.eventfds.error = error;
    }

    /// Whether the description is complete, so that a worker can serve the queue.
    pub fn is_complete(&self) -> bool {
        self.started && self.enabled && self.size != 0 && self.rings.is_some()
    }

    /// Starts a worker if the description is complete. A wrong description is reported on the error
    /// descriptor.
    ///
    /// # Errors
    ///
    /// [`Refusal::Start`] if the process has no thread, descriptor or memory left. This is also
    /// reported on the error descriptor, for front-ends that ask for no reply.
    pub fn start(&mut self, index: u16, context: &ConnectionContext) -> Result<(), Refusal> {
        let (Some(rings), State::Stopped) = (self.rings, &self.state) else {
            return Ok(());
        };
        if !self.is_complete() {
            return Ok(());
        }
        let Some(rings) = rings.translate(&context.memory) else {
            ratelimited_log::error(format_args!(
                "queue {index}: the rings are not in the memory that the front-end shares; start the \
                 VMM with shared guest memory (share=on for QEMU, shared=on for Cloud Hypervisor)"
            ));
            self.fail();
            return Ok(());
        };
        let setup = QueueSetup {
            index,
            size: self.size,
            rings,
            base: self.base,
            eventfds: self.eventfds.for_another_thread(),
        };
        match Worker::start(setup, context.clone()) {
            Ok(worker) => self.state = State::Running(worker),
            Err(source @ StartFailure::Resources(_)) => {
                self.fail();
                return Err(Refusal::Start { index, source });
            }
            Err(StartFailure::Queue(error)) => {
                ratelimited_log::error(format_args!(
                    "cannot start queue {index}: {}",
                    reason(&error)
                ));
                self.fail();
            }
        }
        Ok(())
    }

    fn fail(&mut self) {
        self.eventfds.signal_error();
        self.state = State::Failed;
    }

    /// Drains and ends the worker, if one runs. The next start continues from where it stopped.
    pub fn stop(&mut self, after: AfterStop) {
        if let State::Running(worker) = std::mem::replace(&mut self.state, State::Stopped) {
            match worker.stop(after) {
                Resume::At(next) => self.base = Some(next),
                Resume::AsBefore => {}
                Resume::AtUsedIndex => self.base = None,
            }
        }
    }

    /// Stops the queue until the next kick descriptor, and returns the available index to continue from.
    /// If the front-end set no base, this is the index from which the queue would start; 0 without
    /// rings.
    pub fn stop_at_base(
        &mut self,
        index: u16,
        memory: &Memory,
        area: Option<&InflightArea>,
    ) -> u16 {
        self.stop(AfterStop::Stop);
        (self.eventfds.kick, self.started) = (None, false);
        let from_rings = || {
            let rings = self.rings?.translate(memory)?;
            let inflight = area.and_then(|area| area.queue(index, self.size));
            start_index(memory, rings.used, inflight.as_ref())
        };
        self.base.or_else(from_rings).unwrap_or(0)
    }

    /// Asks the worker to end, without waiting, so that several can drain at the same time.
    pub fn begin_stop(&self, after: AfterStop) {
        if let State::Running(worker) = &self.state {
            worker.begin_stop(after);
        }
    }

    /// Resets the queue to where it was before its start.
    pub fn reset(&mut self) {
        (self.started, self.enabled, self.base) = (false, false, None);
    }
}
