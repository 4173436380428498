//! Offload thread: flushes, discards and writes zeroes, so that the queue worker need not wait. Each queue of
//! a writable disk has one.
//!
//! Operations go in through one channel, results come out through another, and an eventfd wakes the worker. The
//! thread takes all waiting operations together. It discards and writes zeroes one by one; then one flush serves all
//! operations that need one, because it covers every write before it.
#![cfg_attr(not(test), warn(clippy::indexing_slicing))]

use std::cell::Cell;
use std::io;
use std::mem;
use std::os::unix::net::UnixStream;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::BlockBackend;
use super::setup::GRACE;
use super::stats::queue::{QueueStats, cell};
use crate::ratelimited_log;
use crate::reason::reason;
use crate::units::SectorRange;
use crate::virtio::discard::DiscardRange;
use crate::virtio::status::Status;
use crate::writable::{Error, MAX_STEP, Volume};

/// Id of an operation, chosen by the worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OperationId(pub u16);

/// Operation on the volume that may take long: a change of ranges, a flush, or both.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct VolumeOperation {
    /// Change, and the ranges to apply it to, before the flush.
    pub change: Option<(RangeChange, Vec<DiscardRange>)>,
    /// Whether to flush: to make the change and all writes before it durable.
    pub flush: bool,
}

/// Change of ranges of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeChange {
    /// Discard their data.
    Discard,
    /// Make them read as zeros.
    Zero,
}

impl RangeChange {
    /// Name in the log.
    fn name(self) -> &'static str {
        match self {
            RangeChange::Discard => "a discard",
            RangeChange::Zero => "writing zeros",
        }
    }

    /// Applies the change to one step of a range.
    fn apply(self, volume: &Volume, step: SectorRange, unmap: bool) -> Result<(), Error> {
        match self {
            RangeChange::Discard => volume.discard(step),
            RangeChange::Zero => volume.write_zeroes(step, unmap),
        }
    }
}

/// How an operation ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OperationEnd {
    /// With this status of its request.
    Answered(Status),
    /// The queue stops: some ranges are not changed.
    Late,
    /// Some of it is not done because the storage is full; its request waits for space.
    StorageFull {
        /// The failure.
        reason: String,
    },
}

/// Result of an operation.
#[derive(Debug, PartialEq, Eq)]
pub struct EndedOperation {
    /// Its id.
    pub id: OperationId,
    /// What is left of it, to repeat it.
    pub operation: VolumeOperation,
    /// How it ended.
    pub end: OperationEnd,
}

/// Performs operations on the thread.
struct Performer {
    backend: Arc<BlockBackend>,
    queue: u16,
    /// Connection of the front-end.
    connection: Arc<UnixStream>,
    /// Time at which the end of the connection was first seen.
    over: Cell<Option<Instant>>,
    /// How long after that time steps are still begun.
    grace: Duration,
    /// Set when the worker is dropped and takes no more results.
    abandoned: Arc<AtomicBool>,
}

impl Performer {
    /// Runs `attempt`. An error or a panic fails the request, not the thread.
    fn attempt(
        &self,
        what: &str,
        attempt: impl FnOnce(&Volume) -> Result<(), Error>,
    ) -> OperationEnd {
        let attempt = AssertUnwindSafe(|| attempt(self.backend.volume()));
        let reason = match panic::catch_unwind(attempt) {
            Ok(Ok(())) => return OperationEnd::Answered(Status::Ok),
            Ok(Err(error)) if self.backend.full_storage().pauses_on(&error) => {
                let reason = reason(&error);
                return OperationEnd::StorageFull { reason };
            }
            Ok(Err(error)) => reason(&error),
            Err(_) => "a panic".to_owned(),
        };
        let queue = self.queue;
        ratelimited_log::warn(format_args!("queue {queue}: {what} failed: {reason}"));
        OperationEnd::Answered(Status::IoError)
    }

    /// Applies a change to ranges, step by step, until a step fails or time runs out.
    fn change(&self, change: RangeChange, ranges: &[DiscardRange]) -> OperationEnd {
        let steps = ranges.iter().flat_map(|discard| {
            let steps = discard.range.steps(MAX_STEP);
            steps.map(|step| (step, discard.unmap))
        });
        for (step, unmap) in steps {
            if self.is_late() {
                return OperationEnd::Late;
            }
            match self.attempt(change.name(), |volume| change.apply(volume, step, unmap)) {
                OperationEnd::Answered(Status::Ok) => {}
                failed => return failed,
            }
        }
        if change == RangeChange::Discard {
            // No other thread writes to this cell.
            let stats = QueueStats::new(self.backend.stats(), self.queue);
            let ranges = ranges.iter().map(|discard| discard.range.len().bytes());
            stats.add(cell::DISCARDED_BYTES, ranges.fold(0, u64::saturating_add));
        }
        OperationEnd::Answered(Status::Ok)
    }

    /// Whether the queue stops and its grace period is over.
    fn is_late(&self) -> bool {
        if self.abandoned.load(Ordering::Relaxed) {
            return true;
        }
        // POLLRDHUP is reported even while messages are unread.
        let mut watched = [PollFd::new(&*self.connection, PollFlags::RDHUP)];
        let looked = poll(&mut watched, Some(&Timespec::default()));
        if !matches!(looked, Ok(1..)) {
            return false;
        }
        let since = self.over.get().unwrap_or_else(Instant::now);
        self.over.set(Some(since));
        since.elapsed() >= self.grace
    }

    /// Performs all operations of `batch`, and calls `done` with the result of each.
    fn perform(
        &self,
        batch: Vec<(OperationId, VolumeOperation)>,
        mut done: impl FnMut(EndedOperation),
    ) {
        let mut flushing = Vec::new();
        for (id, mut operation) in batch {
            let end = match &operation.change {
                Some((change, ranges)) => self.change(*change, ranges),
                None => OperationEnd::Answered(Status::Ok),
            };
            match end {
                OperationEnd::Answered(Status::Ok) if operation.flush => {
                    operation.change = None;
                    flushing.push((id, operation));
                }
                end => done(EndedOperation { id, operation, end }),
            }
        }
        if flushing.is_empty() {
            return;
        }
        let end = self.attempt("a flush", Volume::flush);
        for (id, operation) in flushing {
            let end = end.clone();
            done(EndedOperation { id, operation, end });
        }
    }
}

/// Offload thread of one worker.
#[derive(Debug)]
pub struct Offload {
    /// Dropped to end the thread.
    operations: Option<Sender<(OperationId, VolumeOperation)>>,
    results: Receiver<EndedOperation>,
    /// Signalled at each result.
    event: Arc<EventFd>,
    under_way: usize,
    abandoned: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Offload {
    /// Starts the thread of queue `queue`, for the front-end at the other end of `connection`.
    ///
    /// # Errors
    ///
    /// No thread or descriptor is left.
    pub fn start(
        queue: u16,
        backend: Arc<BlockBackend>,
        connection: Arc<UnixStream>,
    ) -> io::Result<Self> {
        let event = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let (operations, waiting) = channel::<(OperationId, VolumeOperation)>();
        let (sender, results) = channel();
        let wake = event.clone();
        let abandoned = Arc::new(AtomicBool::new(false));
        let performer = Performer {
            backend,
            queue,
            connection,
            over: Cell::new(None),
            grace: GRACE,
            abandoned: abandoned.clone(),
        };
        let thread = thread::Builder::new()
            .name(format!("flush-{queue}"))
            .spawn(move || {
                while let Ok(first) = waiting.recv() {
                    let batch = [first].into_iter().chain(waiting.try_iter()).collect();
                    performer.perform(batch, |result| {
                        // It fails only if the worker was dropped.
                        let _ = sender.send(result);
                        // It fails if the counter is at its limit, which wakes the worker too.
                        let _ = wake.write(1);
                    });
                    performer.backend.record_used();
                }
            })?;
        Ok(Self {
            operations: Some(operations),
            results,
            event,
            under_way: 0,
            abandoned,
            thread: Some(thread),
        })
    }

    /// Eventfd that is signalled at each result.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Number of operations without a result.
    pub fn under_way(&self) -> usize {
        self.under_way
    }

    /// Begins an operation.
    pub fn begin(&mut self, id: OperationId, operation: VolumeOperation) {
        let sent = self
            .operations
            .as_ref()
            .map(|operations| operations.send((id, operation)));
        debug_assert!(
            matches!(sent, Some(Ok(()))),
            "the thread outlives its operations"
        );
        self.under_way += 1;
    }

    /// Takes the next result, if there is one.
    pub fn result(&mut self) -> Option<EndedOperation> {
        self.end_operation(|results| results.try_recv().ok())
    }

    /// Waits for the next result; `None` if no operation is under way.
    pub fn wait(&mut self) -> Option<EndedOperation> {
        self.end_operation(|results| results.recv().ok())
    }

    /// Takes a result with `receive`, unless no operation is under way.
    fn end_operation(
        &mut self,
        receive: impl FnOnce(&Receiver<EndedOperation>) -> Option<EndedOperation>,
    ) -> Option<EndedOperation> {
        if self.under_way == 0 {
            return None;
        }
        let result = receive(&self.results)?;
        self.under_way -= 1;
        Some(result)
    }
}

impl Drop for Offload {
    fn drop(&mut self) {
        self.abandoned.store(true, Ordering::Relaxed);
        drop(mem::take(&mut self.operations));
        if let Some(thread) = self.thread.take() {
            // It cannot fail: the thread catches panics.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::path::Path;

    use uuid::Uuid;

    use super::*;
    use crate::engine::rate_limit::LimitsSpec;
    use crate::engine::ring::Rings;
    use crate::engine::stats::StatsPage;
    use crate::engine::{BackendOptions, Tuning};
    use crate::format::lsmt::writable::Kind;
    use crate::format::lsmt::{HEADER_LEN, Header, HeaderKind};
    use crate::image::Image;
    use crate::image::config::Stack;
    use crate::units::Sector;
    use crate::writable::{Lookup, OnFull, Options, Paths, SpanContent, WritableLayer, create};

    const SECTORS: u64 = 1 << 20;

    /// An empty writable disk.
    fn backend(folder: &Path) -> Arc<BlockBackend> {
        let header = Header {
            index_offset: HEADER_LEN as u64,
            index_entries: 0,
            virtual_size: SECTORS * 512,
            uuid: Uuid::nil(),
            parent_uuid: Uuid::nil(),
            message: Vec::new(),
        };
        let layer = [HeaderKind::Header, HeaderKind::Trailer].map(|part| header.encode(part));
        let lower = folder.join("lower");
        std::fs::write(&lower, layer.as_flattened()).unwrap();
        let image = Image::open(&Stack::new([lower])).unwrap();
        let paths = Paths {
            data: folder.join("data"),
            index: folder.join("index"),
        };
        create(&paths, Kind::Hybrid, &header).unwrap();
        let upper = WritableLayer::open(&paths, None, &Options::default()).unwrap();
        let options = BackendOptions {
            queues: 1,
            queue_size: 64,
            serial: Default::default(),
            block_cache: 0,
            on_full: OnFull::Error,
            tuning: Tuning::default(),
            limits: LimitsSpec::default(),
            stats: StatsPage::anonymous().unwrap(),
        };
        let volume = Volume::writable(image, upper).into();
        Arc::new(BlockBackend::new(volume, options, Rings::default()))
    }

    fn operation(change: RangeChange) -> VolumeOperation {
        let range = DiscardRange {
            range: SectorRange::new(Sector(0), Sector(SECTORS)),
            unmap: false,
        };
        VolumeOperation {
            change: Some((change, vec![range])),
            flush: false,
        }
    }

    /// A queue stops in time once its connection has ended, however much is left to discard.
    #[test]
    fn what_is_not_done_when_time_is_up_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let backend = backend(folder.path());
        let first = |fill: u8| {
            let mut data = [fill; 512];
            let mut scatter = crate::io::scatter::Scatter::new();
            scatter.push(vm_memory::VolatileSlice::from(&mut data[..]));
            let written = backend
                .volume()
                .write_now(SectorRange::new(Sector(0), Sector(1)), scatter.cursor(0));
            written.unwrap();
        };
        let read = || {
            let (mut found, mut lookup) = ([0; 512], Lookup::default());
            let first = SectorRange::new(Sector(0), Sector(1));
            backend.volume().lookup(first, &mut lookup);
            match lookup.spans().first().map(|span| span.content) {
                Some(SpanContent::Zero) => {}
                Some(SpanContent::Data { file, offset }) => {
                    let file = lookup.file(file);
                    file.read_exact_at(&mut found, offset).unwrap();
                }
                _ => panic!("the sector was written"),
            }
            found
        };
        let (connection, mut theirs) = UnixStream::pair().unwrap();
        let performer = Performer {
            backend: backend.clone(),
            queue: 0,
            connection: Arc::new(connection),
            over: Cell::new(None),
            grace: Duration::ZERO,
            abandoned: Arc::default(),
        };
        let perform = || {
            let mut answers = Vec::new();
            let operations = [
                operation(RangeChange::Discard),
                operation(RangeChange::Zero),
                VolumeOperation::default(),
            ];
            let operations = (0..).map(OperationId).zip(operations).collect();
            performer.perform(operations, |result| answers.push((result.id, result.end)));
            answers
        };
        first(1);
        let done = [0, 1, 2].map(|id| (OperationId(id), OperationEnd::Answered(Status::Ok)));
        assert_eq!(perform(), done);
        assert_eq!(read(), [0; 512]);

        first(2);
        theirs.write_all(b"a message that is not read").unwrap();
        drop(theirs);
        let cut = [
            OperationEnd::Late,
            OperationEnd::Late,
            OperationEnd::Answered(Status::Ok),
        ];
        let cut: Vec<_> = (0..).map(OperationId).zip(cut).collect();
        assert_eq!(perform(), cut);
        assert_eq!(read(), [2; 512]);
    }
}
