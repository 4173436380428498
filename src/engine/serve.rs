//! The loop of one queue: take chains, plan them, serve them, answer them.

mod change;
mod drain;

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::Ordering;
use std::time::Instant;

use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;

use super::Disk;
use super::background::{Background, Change};
use super::polling::Polling;
use super::ratelimited_log;
use super::read::{Fetcher, Progress};
use super::readahead::Readahead;
use super::setup::{ConnectionContext, Eventfds, QueueSetup, Stop};
use super::task::Task;
use crate::image;
use crate::io::poller::{Poller, Trigger};
use crate::reason::reason;
use crate::source::resident_map::major_faults;
use crate::units::SECTOR_SIZE;
use crate::virtio::chain::{BadChain, ChainError};
use crate::virtio::memory::Memory;
use crate::virtio::queue::{Head, Queue, QueueError};
use crate::virtio::request::Operation;
use crate::virtio::status::Status;

/// Requests at each step before being served, so that what the next step looks at is in the cache.
const AHEAD: usize = 4;

/// Answers published together at most, and their bytes, while more requests wait: who has many small
/// ones in flight is called less often, who has a few large ones prepares the next meanwhile.
const BATCH: u32 = 16;
const BATCH_BYTES: usize = 256 << 10;

/// Requests that wait for a read to finish before theirs can begin; no more are taken then.
const MAX_STALLED: usize = 64;

/// Requests that wait for the background thread at most: each keeps its chain's lists.
const MAX_IN_BACKGROUND: usize = 64;

/// Requests between two looks at the count of page faults that waited for storage.
const FAULT_CHECK: u32 = 64;

/// Page faults among them that waited for storage, from which on nothing counts as in memory any
/// more. To learn it again takes a system call per page, which a rare fault is not worth.
const FAULTS_TO_FORGET: u64 = 4;

/// Why a worker ends by itself.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// The driver broke the virtqueue's rules.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// A chain is bad, and the place of its status is not to be found or not shared.
    #[error("no status can be written to the chain at descriptor {head}: {error}")]
    Chain {
        /// Head descriptor of the chain.
        head: u16,
        /// What is wrong with it.
        error: ChainError,
    },
    /// Guest memory, or another area the front-end shares, is gone.
    #[error("the front-end cut the memory it shares")]
    MemoryLost,
    /// The system does not let us wait.
    #[error("waiting for events")]
    Wait(#[from] io::Error),
}

const KICK: u64 = 0;
const STOP: u64 = 1;
const STORAGE: u64 = 2;
const BACKGROUND: u64 = 3;

/// One queue being served.
pub struct QueueWorker<'a> {
    queue: Queue<'a>,
    index: u16,
    disk: &'a Disk,
    context: &'a ConnectionContext,
    memory: &'a Memory,
    /// What the driver acknowledged.
    features: u64,
    eventfds: &'a Eventfds,
    fetcher: Fetcher<'a>,
    /// For a device that can be written to.
    background: Option<Background>,
    polling: Polling,
    readahead: Readahead,
    /// Requests under way, by slot.
    tasks: Vec<Task<'a>>,
    free: Vec<u16>,
    /// Looked up; what says where their bytes are is on its way into the cache.
    looked_up: VecDeque<u16>,
    /// Planned; where in memory the pages of their bytes are is on its way.
    planned: VecDeque<u16>,
    /// About to be served; their bytes are on their way.
    fetched: VecDeque<u16>,
    /// Waiting for a read to finish, so that they can begin theirs.
    stalled: VecDeque<u16>,
    unpublished: u32,
    unpublished_bytes: usize,
    until_fault_check: u32,
    faults: u64,
}

impl<'a> QueueWorker<'a> {
    /// Takes a started queue over.
    ///
    /// # Errors
    ///
    /// A device that can be written to needs one more thread, which is not to be had.
    pub fn new(
        queue: Queue<'a>,
        setup: &'a QueueSetup,
        context: &'a ConnectionContext,
    ) -> io::Result<Self> {
        let writable = context.disk.volume.is_writable();
        let background = writable
            .then(|| {
                let connection = context.hangup.clone();
                Background::start(setup.index, context.disk.clone(), connection)
            })
            .transpose()?;
        let uring = context.disk.rings.take();
        let made = context.disk.rings.made();
        if uring.is_none() && made > 0 {
            let index = setup.index;
            ratelimited_log::warn(format_args!(
                "queue {index} reads with pread: {made} io_uring rings were made and all are in \
                 use; --num-queues N makes N rings"
            ));
        }
        Ok(Self {
            queue,
            index: setup.index,
            disk: &context.disk,
            context,
            memory: &context.memory,
            features: context.features,
            eventfds: &setup.eventfds,
            fetcher: Fetcher::new(&context.disk, uring),
            background,
            polling: Polling::new(context.disk.tuning.poll),
            readahead: Readahead::new(context.disk.tuning.readahead),
            tasks: Vec::new(),
            free: Vec::new(),
            looked_up: VecDeque::new(),
            planned: VecDeque::new(),
            fetched: VecDeque::new(),
            stalled: VecDeque::new(),
            unpublished: 0,
            unpublished_bytes: 0,
            until_fault_check: FAULT_CHECK,
            faults: major_faults(),
        })
    }

    /// Serves the queue until asked to stop.
    pub fn serve(&mut self, stop: &Stop) -> Result<(), Broken> {
        let poller = Poller::new()?;
        poller.watch(&stop.event, STOP, Trigger::Level)?;
        if let Some(kick) = &self.eventfds.kick {
            poller.watch(kick.as_ref(), KICK, Trigger::Edge)?;
        }
        if let Some(uring) = self.fetcher.descriptor() {
            poller.watch(&uring, STORAGE, Trigger::Level)?;
        }
        if let Some(background) = &self.background {
            poller.watch(background.event(), BACKGROUND, Trigger::Edge)?;
        }
        // Without a kick descriptor the driver cannot call us.
        let timeout = if self.eventfds.kick.is_some() { -1 } else { 1 };
        // A process before us may have died between an answer and its signal.
        self.eventfds.signal_call();
        while !stop.asked.load(Ordering::Acquire) {
            self.queue.disable_kicks();
            if self.turn(stop)? {
                continue;
            }
            // While it is full, more in the ring is no reason to stay awake: storage is.
            if !self.is_full() && (self.poll_ring(stop)? || self.queue.enable_kicks()?) {
                continue;
            }
            // What io_uring has no room for is offered again soon.
            let timeout = if self.fetcher.is_backlogged() {
                1
            } else {
                timeout
            };
            self.polling.sleep(|| poller.wait(timeout, |_| ()))?;
        }
        Ok(())
    }

    /// Looks at the ring for a while before sleeping; returns whether there is work.
    fn poll_ring(&mut self, stop: &Stop) -> Result<bool, Broken> {
        let window = self.polling.window();
        if window.is_zero() {
            return Ok(false);
        }
        let end = Instant::now() + window;
        loop {
            if self.queue.has_work()? || stop.asked.load(Ordering::Acquire) {
                self.polling.found();
                return Ok(true);
            }
            if self.fetcher.is_waiting() || self.awaits_background() {
                return Ok(false);
            }
            if Instant::now() >= end {
                self.polling.missed();
                return Ok(false);
            }
            std::hint::spin_loop();
        }
    }

    /// Takes what is in the ring and what storage delivered; returns whether there was anything.
    fn turn(&mut self, stop: &Stop) -> Result<bool, Broken> {
        let mut worked = false;
        // Bounded, so that a driver that never pauses does not keep finished reads waiting.
        for _ in 0..self.queue.size() {
            if self.is_full() || stop.asked.load(Ordering::Relaxed) {
                break;
            }
            let Some(head) = self.queue.pop()? else {
                break;
            };
            worked = true;
            self.accept(head)?;
            self.advance(AHEAD);
        }
        self.advance(0);
        self.publish()?;
        self.start_reads();
        worked |= self.take_reads();
        worked |= self.take_background();
        self.publish()?;
        Ok(worked)
    }

    /// Whether no more can be taken before a read has finished.
    fn is_full(&self) -> bool {
        let in_background = self.background.as_ref().map_or(0, Background::under_way);
        self.under_way() >= usize::from(self.queue.size())
            || self.stalled.len() >= MAX_STALLED
            || in_background >= MAX_IN_BACKGROUND
    }

    fn under_way(&self) -> usize {
        self.tasks.len() - self.free.len()
    }

    /// Takes one chain: answers its request, or plans its read.
    ///
    /// # Errors
    /// The chain cannot be answered.
    fn accept(&mut self, head: Head) -> Result<(), Broken> {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.tasks.push(Task::default());
            // As many tasks as the queue has descriptors, at most 32768.
            (self.tasks.len() - 1) as u16
        });
        let task = &mut self.tasks[usize::from(slot)];
        let table = self.queue.descriptors();
        let indirect = self.features & 1 << VIRTIO_RING_F_INDIRECT_DESC != 0;
        match task.chain.walk(self.memory, table, head.number(), indirect) {
            Ok(status) => (task.head, task.status) = (Some(head), Some(status)),
            Err(bad) => return self.refuse(slot, head, bad),
        }
        self.begin(slot);
        Ok(())
    }

    /// Answers a chain that cannot be served.
    ///
    /// # Errors
    /// There is no place for the answer. Without one, the driver would find the status that the
    /// request before left in the same memory.
    #[cold]
    fn refuse(&mut self, slot: u16, head: Head, bad: BadChain<'a>) -> Result<(), Broken> {
        let (index, number, error) = (self.index, head.number(), bad.error);
        let Some(status) = bad.status else {
            self.let_go(slot);
            self.queue.put_back(head);
            let head = number;
            return Err(Broken::Chain { head, error });
        };
        ratelimited_log::warn(format_args!(
            "queue {index}: bad chain at descriptor {number}: {error}"
        ));
        let task = &mut self.tasks[usize::from(slot)];
        (task.head, task.status) = (Some(head), Some(status));
        self.answer(slot, Status::IoError, 0);
        Ok(())
    }

    /// Begins the request of the task in `slot`.
    fn begin(&mut self, slot: u16) {
        let task = &mut self.tasks[usize::from(slot)];
        match Operation::parse(&task.chain, &self.disk.config) {
            Ok(Operation::Read(start)) => {
                let sectors = task.chain.writable().len() as u64 / SECTOR_SIZE;
                let volume = &self.disk.volume;
                task.begin(volume, start, sectors);
                self.readahead.note(volume.image(), start, sectors);
                self.looked_up.push_back(slot);
            }
            Ok(Operation::GetId) => {
                let data = task.chain.writable();
                let len = data.len().min(self.disk.serial.len());
                data.cursor(0).write(&self.disk.serial[..len]);
                self.answer(slot, Status::Ok, len);
            }
            Ok(Operation::Write(start)) => self.write(slot, start),
            Ok(Operation::Flush) => self.flush(slot),
            Ok(Operation::Discard(ranges)) => self.change(slot, Change::Discard, ranges),
            Ok(Operation::WriteZeroes(ranges)) => self.change(slot, Change::Zero, ranges),
            Err(status) => self.answer(slot, status, 0),
        }
    }

    /// Takes requests from step to step, and serves them, until `ahead` are left at each. Publishes
    /// what is ripe.
    fn advance(&mut self, ahead: usize) {
        while self.looked_up.len() > ahead
            && let Some(slot) = self.looked_up.pop_front()
        {
            self.fetcher
                .prefetch_pages(&mut self.tasks[usize::from(slot)]);
            self.planned.push_back(slot);
        }
        while self.planned.len() > ahead
            && let Some(slot) = self.planned.pop_front()
        {
            self.fetcher.prefetch(&mut self.tasks[usize::from(slot)]);
            self.fetched.push_back(slot);
        }
        while self.fetched.len() > ahead
            && let Some(slot) = self.fetched.pop_front()
        {
            self.serve_task(slot);
            self.check_faults();
            self.publish_batch();
        }
        self.publish_batch();
    }

    /// Publishes answers once they are as many as belong together.
    fn publish_batch(&mut self) {
        let ripe = self.unpublished >= BATCH || self.unpublished_bytes >= BATCH_BYTES;
        // The last one of a turn says so if memory is lost.
        if ripe && self.publish().is_ok() {
            self.start_reads();
        }
    }

    /// Looks now and then whether pages were evicted.
    fn check_faults(&mut self) {
        self.until_fault_check -= 1;
        if self.until_fault_check == 0 {
            self.until_fault_check = FAULT_CHECK;
            let faults = major_faults();
            if faults.saturating_sub(self.faults) >= FAULTS_TO_FORGET {
                self.disk.volume.image().forget_resident();
            }
            self.faults = faults;
        }
    }

    fn serve_task(&mut self, slot: u16) {
        let task = &mut self.tasks[usize::from(slot)];
        match self.fetcher.serve(slot, task) {
            Ok(Progress::Begun) => {}
            Ok(Progress::Stalled) => return self.stalled.push_back(slot),
            Err(error) => self.complain("a read", &error),
        }
        self.finish_if_done(slot);
    }

    fn complain(&mut self, what: &str, error: &dyn std::error::Error) {
        let (index, reason) = (self.index, reason(error));
        ratelimited_log::warn(format_args!("queue {index}: {what} fails: {reason}"));
    }

    fn finish_if_done(&mut self, slot: u16) {
        let task = &self.tasks[usize::from(slot)];
        if task.outstanding > 0 {
            return;
        }
        let status = match task.failed {
            true => Status::IoError,
            false => Status::Ok,
        };
        self.answer(slot, status, task.chain.writable().len());
    }

    /// Answers a task, of whose data the first `touched` bytes may have been written, and have
    /// been if the status is good.
    fn answer(&mut self, slot: u16, status: Status, touched: usize) {
        let task = &mut self.tasks[usize::from(slot)];
        let log = self.memory.log();
        if let Some(log) = log {
            task.chain.mark_written(log, touched as u64);
        }
        if let Some(byte) = task.status.take() {
            byte.write(status, log);
        }
        let written = if status == Status::Ok { touched } else { 0 };
        // The data is no longer than MAX_DATA.
        let len = written as u32 + 1;
        if let Some(head) = task.head.take() {
            self.queue.finish(head, len);
        }
        self.let_go(slot);
        self.unpublished += 1;
        self.unpublished_bytes += len as usize;
    }

    /// Frees a task.
    fn let_go(&mut self, slot: u16) {
        let task = &mut self.tasks[usize::from(slot)];
        task.lookup.clear();
        task.flushes = 0;
        self.free.push(slot);
    }

    /// Makes answers visible and signals, if the driver wants it.
    fn publish(&mut self) -> Result<(), Broken> {
        if self.context.is_lost() {
            return Err(Broken::MemoryLost);
        }
        (self.unpublished, self.unpublished_bytes) = (0, 0);
        if self.queue.publish() {
            self.eventfds.signal_call();
        }
        Ok(())
    }

    fn start_reads(&mut self) {
        let Err(error) = self.fetcher.submit() else {
            return;
        };
        self.fall_back(error);
    }

    /// Goes on without io_uring.
    fn fall_back(&mut self, error: io::Error) {
        ratelimited_log::error(format_args!(
            "queue {}: io_uring fails ({error}): reading with pread",
            self.index
        ));
        while let Some((slot, outcome)) = self.fetcher.fall_back(&mut self.tasks) {
            self.settle(slot, outcome);
        }
        self.resume_stalled();
    }

    /// Takes note of a finished read of the task in `slot`.
    fn settle(&mut self, slot: u16, outcome: Result<(), image::Error>) {
        if let Err(error) = outcome {
            self.tasks[usize::from(slot)].abandon();
            self.complain("a read", &error);
        }
        if !self.stalled.contains(&slot) {
            self.finish_if_done(slot);
        }
    }

    /// Lets stalled tasks go on, as far as there is room.
    fn resume_stalled(&mut self) {
        for _ in 0..self.stalled.len() {
            if !self.fetcher.has_room() {
                return;
            }
            let Some(slot) = self.stalled.pop_front() else {
                return;
            };
            self.serve_task(slot);
        }
    }

    /// Takes what storage delivered; returns whether there was anything.
    fn take_reads(&mut self) -> bool {
        let mut any = false;
        while let Some((slot, outcome)) = self.fetcher.complete(&mut self.tasks) {
            any = true;
            self.settle(slot, outcome);
        }
        if any {
            self.resume_stalled();
        }
        // Even without a finished read, the rest of one that came short may have been prepared.
        self.start_reads();
        any
    }
}
