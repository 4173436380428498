//! Thread of a queue worker: starts and stops it.
#![cfg_attr(not(test), warn(clippy::indexing_slicing))]

use std::io;
use std::net::Shutdown;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::queue_worker::QueueWorker;
use super::setup::{AfterStop, ConnectionContext, QueueSetup, Stop};
use crate::io::interrupt::PeerCall;
use crate::ratelimited_log;
use crate::reason::reason;
use crate::virtio::queue::{Queue, StartError};

/// Available index from which a queue continues when it starts again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resume {
    /// This index.
    At(u16),
    /// The index from which the worker should have started: it did not start.
    AsBefore,
    /// The used index: the worker panicked.
    AtUsedIndex,
}

/// Time between two interrupts of a worker that does not end.
const INTERRUPT_PERIOD: Duration = Duration::from_millis(10);

/// Error of starting a queue worker.
#[derive(Debug, thiserror::Error)]
pub enum StartFailure {
    /// The description of the queue is wrong.
    #[error(transparent)]
    Queue(#[from] StartError),
    /// The process has no thread, descriptor or memory left.
    #[error("cannot start the threads of the queue")]
    Resources(#[from] io::Error),
}

/// A running queue worker.
#[derive(Debug)]
pub struct Worker {
    thread: JoinHandle<Resume>,
    stop: Arc<Stop>,
    /// Interrupts writes to eventfds, which the front-end can block.
    writer: Arc<PeerCall>,
    /// Disconnected when the thread ends.
    ended: Receiver<Never>,
}

/// Type without a value.
#[derive(Debug)]
enum Never {}

/// Channels of the worker to the thread that starts it.
struct Reports {
    started: SyncSender<Result<(), StartFailure>>,
    /// Dropped when the worker ends.
    _ended: SyncSender<Never>,
}

impl Worker {
    /// Starts a worker, and waits until it serves its queue.
    ///
    /// # Errors
    ///
    /// [`StartFailure::Resources`] if no thread, descriptor or memory is left, [`StartFailure::Queue`] if the
    /// description of the queue is wrong.
    pub fn start(setup: QueueSetup, context: ConnectionContext) -> Result<Worker, StartFailure> {
        for eventfd in [&setup.eventfds.call, &setup.eventfds.error]
            .into_iter()
            .flatten()
        {
            // A counter at its limit must not block the worker.
            rustix::io::ioctl_fionbio(eventfd, true).map_err(io::Error::from)?;
        }
        let stop = Arc::new(Stop::new()?);
        let writer = setup.eventfds.writer.clone();
        let (started, outcome) = sync_channel(1);
        let (_ended, ended) = sync_channel(0);
        let reports = Reports { started, _ended };
        let theirs = stop.clone();
        let thread = thread::Builder::new()
            .name(format!("queue-{}", setup.index))
            .spawn(move || {
                let run = AssertUnwindSafe(|| run(&setup, &context, &theirs, &reports));
                panic::catch_unwind(run).unwrap_or_else(|_| {
                    // A defect of the daemon. Report it, so that the front-end does not wait for ever.
                    let index = setup.index;
                    ratelimited_log::error(format_args!("the worker of queue {index} panicked"));
                    setup.eventfds.signal_error();
                    let _ = context.hangup.shutdown(Shutdown::Both);
                    Resume::AtUsedIndex
                })
            })?;
        match outcome.recv() {
            Ok(Err(failure)) => Err(failure),
            // Without a report, the worker has panicked and ended the connection.
            Ok(Ok(())) | Err(_) => Ok(Worker {
                thread,
                stop,
                writer,
                ended,
            }),
        }
    }

    /// Asks the worker to drain and end, without waiting for it.
    pub fn begin_stop(&self, after: AfterStop) {
        self.stop.ask(after);
    }

    /// Drains and ends the worker; returns where the queue continues. Waits for storage without limit, up to
    /// [`GRACE`](super::setup::GRACE) for the fetcher, and not for the front-end.
    pub fn stop(self, after: AfterStop) -> Resume {
        self.begin_stop(after);
        while let Err(RecvTimeoutError::Timeout) = self.ended.recv_timeout(INTERRUPT_PERIOD) {
            self.writer.interrupt();
        }
        self.thread.join().unwrap_or(Resume::AtUsedIndex)
    }
}

fn run(setup: &QueueSetup, context: &ConnectionContext, stop: &Stop, reports: &Reports) -> Resume {
    let index = setup.index;
    bind(index, &context.backend.tuning().cpus);
    let started = start_queue(setup, context).map_err(StartFailure::from);
    let started = started.and_then(|queue| Ok(QueueWorker::new(queue, setup, context)?));
    let mut worker = match started {
        Ok(worker) => worker,
        Err(failure) => {
            let _ = reports.started.send(Err(failure));
            return Resume::AsBefore;
        }
    };
    let _ = reports.started.send(Ok(()));
    if let Err(error) = worker.serve(stop) {
        ratelimited_log::error(format_args!("queue {index} stopped: {}", reason(&error)));
        // Lost rings read as zeros, which may break a rule of the virtqueue first.
        if context.is_lost() {
            // It fails if the connection is closed already.
            let _ = context.hangup.shutdown(Shutdown::Both);
        }
        setup.eventfds.signal_error();
    }
    Resume::At(worker.drain(stop.after()))
}

fn bind(index: u16, cpus: &[usize]) {
    let Some(cpu) = cpus.get(usize::from(index) % cpus.len().max(1)) else {
        return;
    };
    let mut set = rustix::thread::CpuSet::new();
    set.set(*cpu);
    if let Err(errno) = rustix::thread::sched_setaffinity(None, &set) {
        ratelimited_log::warn(format_args!(
            "cannot bind queue {index} to processor {cpu}: {}",
            io::Error::from(errno)
        ));
    }
}

fn start_queue<'a>(
    setup: &QueueSetup,
    context: &'a ConnectionContext,
) -> Result<Queue<'a>, StartError> {
    let inflight = context.inflight.as_ref().and_then(|area| {
        let part = area.queue(setup.index, setup.size);
        if part.is_none() && area.report_once() {
            let QueueSetup { index, size, .. } = setup;
            ratelimited_log::warn(format_args!(
                "queue {index} has {size} entries and does not fit the in-flight area: its requests are \
         lost if the daemon is killed"
            ));
        }
        part
    });
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
