//! A queue's thread: how it starts and how it is stopped.

use std::io;
use std::net::Shutdown;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::ratelimited_log;
use super::serve::QueueWorker;
use super::setup::{ConnectionContext, QueueSetup, Stop};
use crate::reason::reason;
use crate::virtio::queue::{Queue, StartError};

/// Where a queue goes on when it starts again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resume {
    /// At this available index.
    At(u16),
    /// Where it was to start: it never did.
    AsBefore,
    /// Where the used ring says: the worker broke down.
    AtUsedIndex,
}

/// A running worker.
#[derive(Debug)]
pub struct Worker {
    thread: JoinHandle<Resume>,
    stop: Arc<Stop>,
}

impl Worker {
    /// Starts serving a queue.
    ///
    /// # Errors
    ///
    /// No thread or descriptor is to be had. A queue that is unusable is no error here: the worker
    /// says so on the error descriptor, and ends.
    pub fn start(setup: QueueSetup, context: ConnectionContext) -> io::Result<Worker> {
        for eventfd in [&setup.eventfds.call, &setup.eventfds.error]
            .into_iter()
            .flatten()
        {
            // A peer that fills the counter must not block us.
            rustix::io::ioctl_fionbio(eventfd, true)?;
        }
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let stop = Arc::new(Stop {
            asked: AtomicBool::new(false),
            event,
        });
        let theirs = stop.clone();
        let thread = thread::Builder::new()
            .name(format!("queue-{}", setup.index))
            .spawn(move || {
                let run = AssertUnwindSafe(|| run(&setup, &context, &theirs));
                panic::catch_unwind(run).unwrap_or_else(|_| {
                    // A defect of ours. The front-end shall see it, not wait for ever.
                    let index = setup.index;
                    ratelimited_log::error(format_args!("the worker of queue {index} panicked"));
                    setup.eventfds.signal_error();
                    let _ = context.hangup.shutdown(Shutdown::Both);
                    Resume::AtUsedIndex
                })
            })?;
        Ok(Worker { thread, stop })
    }

    /// Asks the worker to drain and end, without waiting for it.
    pub fn begin_stop(&self) {
        self.stop.asked.store(true, Ordering::Release);
        // The flag is set; a counter at its limit wakes as well.
        let _ = self.stop.event.write(1);
    }

    /// Drains and ends the worker; returns where the queue goes on.
    pub fn stop(self) -> Resume {
        self.begin_stop();
        self.thread.join().unwrap_or(Resume::AtUsedIndex)
    }
}

fn run(setup: &QueueSetup, context: &ConnectionContext, stop: &Stop) -> Resume {
    let index = setup.index;
    bind(index, &context.disk.tuning.cpus);
    let queue = match start_queue(setup, context) {
        Ok(queue) => queue,
        Err(error) => {
            ratelimited_log::error(format_args!("queue {index} does not start: {error}"));
            setup.eventfds.signal_error();
            return Resume::AsBefore;
        }
    };
    let mut server = match QueueWorker::new(queue, setup, context) {
        Ok(server) => server,
        Err(error) => {
            ratelimited_log::error(format_args!("queue {index} does not start: {error}"));
            setup.eventfds.signal_error();
            return Resume::AsBefore;
        }
    };
    if let Err(broken) = server.serve(stop) {
        ratelimited_log::error(format_args!("queue {index} stops: {}", reason(&broken)));
        // Rings that are gone read as zeros, which may break a rule first.
        if context.is_lost() {
            // Already gone is as good.
            let _ = context.hangup.shutdown(Shutdown::Both);
        }
        setup.eventfds.signal_error();
    }
    Resume::At(server.drain())
}

fn bind(index: u16, cpus: &[usize]) {
    let Some(cpu) = cpus.get(usize::from(index) % cpus.len().max(1)) else {
        return;
    };
    let mut set = rustix::thread::CpuSet::new();
    set.set(*cpu);
    if let Err(errno) = rustix::thread::sched_setaffinity(None, &set) {
        ratelimited_log::warn(format_args!(
            "queue {index} cannot be bound to processor {cpu}: {}",
            io::Error::from(errno)
        ));
    }
}

fn start_queue<'a>(
    setup: &QueueSetup,
    context: &'a ConnectionContext,
) -> Result<Queue<'a>, StartError> {
    let inflight = match &context.inflight {
        Some(area) => Some(area.queue(setup.index, setup.size)?),
        None => None,
    };
    let event_idx = context.features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
    Queue::start(
        &context.memory,
        setup.size,
        setup.rings,
        setup.base,
        event_idx,
        inflight,
    )
}
