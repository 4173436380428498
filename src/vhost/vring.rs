//! One queue as the front-end describes it, message by message, and its worker while it runs.

use std::sync::Arc;

use super::error::Refusal;
use crate::engine::ratelimited_log;
use crate::engine::setup::{ConnectionContext, Eventfds, Next, QueueSetup};
use crate::engine::worker::{Resume, StartFailure, Worker};
use crate::io::interrupt::PeerCall;
use crate::reason::reason;
use crate::virtio::inflight::InflightArea;
use crate::virtio::memory::Memory;
use crate::virtio::queue::{RingAddresses, start_index};

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
#[derive(Debug)]
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
    state: State,
}

/// Whether a queue is served.
#[derive(Debug)]
enum State {
    Stopped,
    Running(Worker),
    /// It did not start, which was reported; a change may let it.
    Failed,
}

impl Vring {
    /// A queue that is not described yet. `writer` is the connection's thread.
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

    /// Whether the front-end said all that a worker needs.
    pub fn is_complete(&self) -> bool {
        self.started && self.enabled && self.size != 0 && self.rings.is_some()
    }

    /// Starts a worker, if the front-end said all that one needs. A queue that it described wrongly
    /// reports that on its error descriptor.
    ///
    /// # Errors
    ///
    /// [`Refusal::Start`] if threads, descriptors or memory are missing. This is also reported on the
    /// error descriptor, for a front-end that asks for no reply.
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

    /// Drains and ends the worker, if one runs; the queue can go on later where it stopped.
    pub fn stop(&mut self, next: Next) {
        if let State::Running(worker) = std::mem::replace(&mut self.state, State::Stopped) {
            match worker.stop(next) {
                Resume::At(next) => self.base = Some(next),
                Resume::AsBefore => {}
                Resume::AtUsedIndex => self.base = None,
            }
        }
    }

    /// The available index to go on from, of a queue that does not run. If the front-end gave none, it is
    /// the one from which the queue would start; 0 without rings.
    pub fn next_available(&self, index: u16, memory: &Memory, area: Option<&InflightArea>) -> u16 {
        let from_rings = || {
            let rings = self.rings?.translate(memory)?;
            let inflight = area.and_then(|area| area.queue(index, self.size));
            start_index(memory, rings.used, inflight.as_ref())
        };
        self.base.or_else(from_rings).unwrap_or(0)
    }

    /// Asks the worker to end, without waiting: many can drain at the same time.
    pub fn begin_stop(&self, next: Next) {
        if let State::Running(worker) = &self.state {
            worker.begin_stop(next);
        }
    }

    /// Forgets that the queue was started, as a reset of the device does.
    pub fn reset(&mut self) {
        (self.started, self.enabled, self.base) = (false, false, None);
    }
}
