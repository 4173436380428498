//! Loop of a queue worker: takes chains, plans reads, serves them, and answers.
#![cfg_attr(not(test), warn(clippy::indexing_slicing))]

mod drain;
mod offloaded;
mod paused;
mod unfinished_write;
mod write;

use std::io;
use std::os::fd::AsFd;
use std::time::Instant;

use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;

use super::BlockBackend;
use super::offload::{Offload, RangeChange};
use super::polling::Polling;
use super::pool::Pool;
use super::prefetch::Prefetch;
use super::rate_limit::throttle::Throttle;
use super::readahead::Readahead;
use super::reads::Reads;
use super::request::{Finished, Put, Request, RequestEnd};
use super::setup::{ConnectionContext, Eventfds, QueueSetup, Stop};
use super::stats::queue::{Op, RequestStats, cell};
use crate::io::poller::{Poller, Trigger};
use crate::ratelimited_log;
use crate::reason::reason;
use crate::source::resident_map::major_faults;
use crate::virtio::chain::{BadChain, Chain, ChainError};
use crate::virtio::memory::Memory;
use crate::virtio::queue::{Head, Queue, QueueError};
use crate::virtio::request::{HEADER, Operation};
use crate::virtio::status::{Status, StatusByte};
use offloaded::OffloadedRequests;
use paused::PausedRequests;

/// Reads that wait after each step of the prefetch, so that the processor's cache has what the next step
/// reads.
const AHEAD: usize = 4;

/// Most answers published together while more requests wait, so that many small requests cause few
/// interrupts; and most bytes of them, so that a driver with large requests can prepare the next ones.
const BATCH: u32 = 16;
const BATCH_BYTES: usize = 256 << 10;

/// Most subreads that wait for room in the ring. With as many, no more requests are taken.
const MAX_QUEUED_FOR_RING: usize = 64;

/// Most offloaded requests: each keeps the lists of its chain.
const MAX_OFFLOADED: usize = 64;

/// Most pieces of guest memory of active reads and paused writes: bounds the memory of requests that wait for absent
/// bytes or for space. A queue of 1024 requests of 32 pages each fits.
const MAX_PIECES_HELD: usize = 1 << 16;

/// Most pieces of guest memory in the lists of a chain that are kept for reuse: longer ones are rare.
const MAX_PIECES_KEPT: usize = 512;

/// Requests between two checks of the count of major page faults.
const FAULT_CHECK: u32 = 64;

/// Major page faults between two checks after which no page counts as in memory any more. Fewer are ignored:
/// finding out again which pages are in memory takes a system call per page.
const FAULTS_TO_FORGET: u64 = 4;

/// Error that ends a worker.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The driver broke a rule of the virtqueue.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// A chain breaks a rule, and its status byte was not found or is not shared.
    #[error("cannot write the status of the chain at descriptor {head}: {error}")]
    Chain {
        /// Head descriptor of the chain.
        head: u16,
        /// Rule that it breaks.
        error: ChainError,
    },
    /// The front-end truncated guest memory, the in-flight area or the dirty log.
    #[error("the front-end truncated its shared memory")]
    MemoryLost,
    /// A call of epoll fails.
    #[error("cannot wait for events")]
    Wait(#[from] io::Error),
}

const KICK: u64 = 0;
const STOP: u64 = 1;
const STORAGE: u64 = 2;
const OFFLOAD: u64 = 3;
const FETCH: u64 = 4;

/// Worker of a running queue.
pub struct QueueWorker<'a> {
    queue: Queue<'a>,
    index: u16,
    backend: &'a BlockBackend,
    context: &'a ConnectionContext,
    memory: &'a Memory,
    /// Acknowledged feature bits.
    features: u64,
    eventfds: &'a Eventfds,
    polling: Polling,
    readahead: Readahead,
    prefetch: Prefetch<'a>,
    throttle: Throttle<'a>,
    stats: RequestStats<'a>,
    reads: Reads<'a>,
    /// `None` for a read-only disk.
    offload: Option<OffloadedRequests<'a>>,
    paused: PausedRequests<'a>,
    /// Number of requests that were taken and not finished.
    under_way: usize,
    chains: Pool<Chain<'a>>,
    unpublished: u32,
    unpublished_bytes: usize,
    until_fault_check: u32,
    faults: u64,
}

impl<'a> QueueWorker<'a> {
    /// Worker for the running queue `queue`.
    ///
    /// # Errors
    ///
    /// No descriptor is left, or no thread, which a writable disk needs.
    pub fn new(
        queue: Queue<'a>,
        setup: &'a QueueSetup,
        context: &'a ConnectionContext,
    ) -> io::Result<Self> {
        let backend = &*context.backend;
        let start = || {
            let connection = context.hangup.clone();
            Offload::start(setup.index, context.backend.clone(), connection)
        };
        let offload = backend.volume().is_writable().then(start).transpose()?;
        let ring = backend.rings().take();
        let made = backend.rings().made();
        if ring.is_none() && made > 0 {
            let index = setup.index;
            ratelimited_log::warn(format_args!(
                "queue {index} reads with pread: all {made} io_uring rings are in use; --num-queues N \
         creates N rings"
            ));
        }
        let stats = RequestStats::new(backend.stats(), setup.index);
        let counters = stats.counters();
        counters.add(cell::RESUBMITTED, queue.open_chains() as u64);
        Ok(Self {
            queue,
            index: setup.index,
            backend,
            context,
            memory: &context.memory,
            features: context.features,
            eventfds: &setup.eventfds,
            polling: Polling::new(backend.tuning().poll),
            readahead: Readahead::new(backend.tuning().readahead),
            prefetch: Prefetch::default(),
            throttle: Throttle::new(backend.rate_limiter(), counters),
            stats,
            reads: Reads::new(setup.index, backend, counters, ring)?,
            offload: offload.map(OffloadedRequests::new),
            paused: PausedRequests::default(),
            under_way: 0,
            chains: Pool::default(),
            unpublished: 0,
            unpublished_bytes: 0,
            until_fault_check: FAULT_CHECK,
            faults: major_faults(),
        })
    }

    /// Serves the queue until `stop` is asked.
    ///
    /// # Errors
    ///
    /// [`ServeError`] if the queue cannot be served any further.
    pub fn serve(&mut self, stop: &Stop) -> Result<(), ServeError> {
        let poller = Poller::new()?;
        poller.watch(stop.event(), STOP, Trigger::Level)?;
        if let Some(kick) = &self.eventfds.kick {
            poller.watch(kick.as_ref(), KICK, Trigger::Edge)?;
        }
        if let Some(ring) = self.reads.ring() {
            poller.watch(&ring.as_fd(), STORAGE, Trigger::Level)?;
        }
        poller.watch(&self.reads.fetch_descriptor(), FETCH, Trigger::Edge)?;
        if let Some(offload) = &self.offload {
            poller.watch(offload.thread().event(), OFFLOAD, Trigger::Edge)?;
        }
        // Without a kick descriptor the ring must be polled.
        let timeout = if self.eventfds.kick.is_some() { -1 } else { 1 };
        // An earlier process may have died between an answer and its signal.
        self.eventfds.signal_call();
        while !stop.is_asked() {
            self.queue.disable_kicks();
            if self.turn(stop)? {
                continue;
            }
            // A full worker takes no more chains: it sleeps until storage, the fetcher or the offload thread
            // has a result. A throttled one sleeps until there are tokens.
            let throttled = self.throttle.sleep();
            let takes = throttled.is_none() && !self.is_full();
            if takes && (self.poll_ring(stop)? || self.queue.enable_kicks()?) {
                continue;
            }
            // Reads for which the kernel had no room are submitted again soon.
            let timeout = match self.reads.is_backlogged() {
                true => 1,
                false => self.paused.shorten(throttled.unwrap_or(timeout)),
            };
            self.polling.sleep(|| poller.wait(timeout, |_| ()))?;
        }
        Ok(())
    }

    /// Polls the available ring before a sleep; returns whether there is work.
    fn poll_ring(&mut self, stop: &Stop) -> Result<bool, ServeError> {
        let window = self.polling.window();
        if window.is_zero() {
            return Ok(false);
        }
        let end = Instant::now() + window;
        loop {
            if self.queue.has_work()? || stop.is_asked() {
                self.polling.found();
                return Ok(true);
            }
            // Results of storage and of the offload thread come soon, by an event.
            if self.reads.is_reading() || self.offloaded() > 0 {
                return Ok(false);
            }
            if Instant::now() >= end {
                self.polling.missed();
                return Ok(false);
            }
            std::hint::spin_loop();
        }
    }

    /// Takes the available chains and the results of storage, fetcher and offload thread; returns whether there
    /// were any.
    fn turn(&mut self, stop: &Stop) -> Result<bool, ServeError> {
        let mut worked = false;
        self.throttle.begin_turn();
        self.stats.begin_turn();
        // Bounded, so that a driver that never pauses does not delay finished reads.
        for _ in 0..self.queue.size() {
            if self.is_full() || stop.is_asked() {
                break;
            }
            if !self.throttle.admits() {
                // A chain that waits for tokens stays in the available ring.
                if self.queue.has_work()? {
                    self.throttle.wait();
                }
                break;
            }
            let Some(head) = self.queue.pop()? else {
                break;
            };
            worked = true;
            self.throttle.take_operation();
            self.begin_chain(head)?;
            self.advance(AHEAD);
        }
        self.advance(0);
        self.publish()?;
        self.reads.submit();
        worked |= self.take_reads();
        worked |= self.take_offloaded();
        worked |= self.retry_paused();
        self.publish()?;
        Ok(worked)
    }

    /// Whether no more requests are taken until one finishes.
    fn is_full(&self) -> bool {
        self.under_way >= usize::from(self.queue.size())
            || self.reads.queued_for_ring() >= MAX_QUEUED_FOR_RING
            || self.reads.pieces() + self.paused.pieces() >= MAX_PIECES_HELD
            || self.offloaded() >= MAX_OFFLOADED
    }

    /// Walks a chain, and answers or begins its request.
    ///
    /// # Errors
    ///
    /// [`ServeError::Chain`] if the chain cannot be answered.
    fn begin_chain(&mut self, head: Head) -> Result<(), ServeError> {
        let mut chain = self.chains.take(Chain::default);
        let table = self.queue.descriptors();
        let indirect = self.features & 1 << VIRTIO_RING_F_INDIRECT_DESC != 0;
        match chain.walk(self.memory, table, head.number(), indirect) {
            Ok(status) => {
                let request = self.take(head, status, chain);
                self.begin(request);
                Ok(())
            }
            Err(bad) => self.refuse(head, chain, bad),
        }
    }

    /// Takes a request, which counts as under way until [`QueueWorker::finish`].
    #[inline]
    fn take(&mut self, head: Head, status: StatusByte<'a>, chain: Box<Chain<'a>>) -> Request<'a> {
        self.under_way += 1;
        Request::new(head, status, chain, self.stats.take())
    }

    /// Answers a chain that breaks a rule.
    ///
    /// # Errors
    ///
    /// [`ServeError::Chain`] if its status byte was not found. An answer without a status would leave the driver
    /// with the status of an earlier request in the same memory.
    #[cold]
    fn refuse(
        &mut self,
        head: Head,
        chain: Box<Chain<'a>>,
        bad: BadChain<'a>,
    ) -> Result<(), ServeError> {
        let (index, number, error) = (self.index, head.number(), bad.error);
        self.stats.counters().add(cell::BAD_CHAINS, 1);
        let Some(status) = bad.status else {
            self.queue.put_back(head);
            let head = number;
            return Err(ServeError::Chain { head, error });
        };
        ratelimited_log::warn(format_args!(
            "queue {index}: bad chain at descriptor {number}: {error}"
        ));
        let request = self.take(head, status, chain);
        self.finish(request.answer(Status::IoError));
        Ok(())
    }

    /// Begins a request.
    #[inline]
    fn begin(&mut self, mut request: Request<'a>) {
        let capacity = self.backend.volume().sectors();
        match Operation::parse(request.chain(), self.backend.config(), capacity) {
            Ok(Operation::Read(range)) => {
                request.is_a(Op::Read);
                self.throttle.take_bytes(range.len().bytes());
                let planned = self.reads.plan(request, range);
                self.prefetch.push(planned);
                self.readahead.record(self.backend.volume(), range);
            }
            Ok(Operation::GetId) => {
                request.is_a(Op::GetId);
                let data = request.chain().writable();
                let serial = self.backend.serial();
                let len = data.len().min(serial.len());
                data.cursor(0).write(serial.get(..len).unwrap_or(serial));
                self.finish(request.finish(RequestEnd::Answered(Status::Ok), len));
            }
            Ok(Operation::Write(range)) => {
                request.is_a(Op::Write);
                self.throttle.take_bytes(range.len().bytes());
                self.write(request, range);
            }
            Ok(Operation::Flush) => {
                request.is_a(Op::Flush);
                self.flush(request, None);
            }
            Ok(Operation::Discard(ranges)) => {
                request.is_a(Op::Discard);
                self.discard_or_zero(request, RangeChange::Discard, ranges);
            }
            Ok(Operation::WriteZeroes(ranges)) => {
                request.is_a(Op::WriteZeroes);
                self.discard_or_zero(request, RangeChange::Zero, ranges);
            }
            Err(status) => self.finish(request.answer(status)),
        }
    }

    /// Serves planned reads until `ahead` are left after each step of the prefetch. Publishes full batches.
    fn advance(&mut self, ahead: usize) {
        while let Some(planned) = self.prefetch.next(ahead, self.reads.delivery()) {
            if let Some(finished) = self.reads.begin(planned) {
                self.finish(finished);
            }
            self.check_faults();
            self.publish_batch();
        }
        self.publish_batch();
    }

    /// Takes the results of storage and fetcher; returns whether there were any.
    fn take_reads(&mut self) -> bool {
        let any = self.reads.take_results();
        self.take_finished();
        any
    }

    /// Answers the reads that have finished.
    fn take_finished(&mut self) {
        while let Some(finished) = self.reads.next_finished() {
            self.finish(finished);
        }
    }

    /// Checks now and then whether pages of blobs were evicted.
    fn check_faults(&mut self) {
        self.until_fault_check -= 1;
        if self.until_fault_check == 0 {
            self.until_fault_check = FAULT_CHECK;
            let faults = major_faults();
            if faults.saturating_sub(self.faults) >= FAULTS_TO_FORGET {
                self.backend.volume().image().forget_resident();
            }
            self.faults = faults;
        }
    }

    #[cold]
    fn warn(&self, what: &str, error: &dyn std::error::Error) {
        let (index, reason) = (self.index, reason(error));
        ratelimited_log::warn(format_args!("queue {index}: {what} failed: {reason}"));
    }

    /// Answers a request, or leaves it to the next worker of the queue.
    #[inline]
    fn finish(&mut self, finished: Finished<'a>) {
        self.under_way -= 1;
        let Put { answer, chain } = finished.put(&mut self.queue);
        if let Some(answer) = answer {
            self.unpublished += 1;
            self.unpublished_bytes += answer.len as usize;
            let data = match answer.counted.op {
                Op::Write if answer.status == Status::Ok => chain.readable().len() - HEADER,
                _ => answer.len as usize - 1,
            };
            self.stats
                .answer(answer.counted, answer.status, data as u64);
        }
        if chain.capacity() <= MAX_PIECES_KEPT {
            self.chains.give_back(chain);
        }
    }

    /// Publishes the answers if they are a full batch.
    #[inline]
    fn publish_batch(&mut self) {
        if self.unpublished >= BATCH || self.unpublished_bytes >= BATCH_BYTES {
            self.publish_full_batch();
        }
    }

    #[inline(never)]
    fn publish_full_batch(&mut self) {
        // An error is found again, and reported, at the end of the turn.
        if self.publish().is_ok() {
            self.reads.submit();
        }
    }

    /// Makes the answers visible, and interrupts the driver if it wants that.
    ///
    /// # Errors
    ///
    /// [`ServeError::MemoryLost`].
    fn publish(&mut self) -> Result<(), ServeError> {
        if self.context.is_lost() {
            return Err(ServeError::MemoryLost);
        }
        (self.unpublished, self.unpublished_bytes) = (0, 0);
        self.stats.publish();
        self.reads.publish_counts();
        if self.queue.publish() {
            self.eventfds.signal_call();
        }
        Ok(())
    }
}
