//! Serves reads: at once where the bytes are in memory, later where they must be read or fetched.
//!
//! A read goes through its parts in order. Each is served, or left pending in the ring or with the
//! fetcher while the next one begins; without room for it, the read waits in line. It is finished
//! when no part is left or pending.

use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use super::BlockBackend;
use super::plan::Plan;
use super::pool::Pool;
use super::ratelimited_log;
use super::reading::{Budget, Planned, ReadId, Reads};
use super::request::{Finished, Request};
use super::ring::Ring;
use super::sources::{Begun, PartResult, Sources};
use crate::image::Error;
use crate::reason::reason;
use crate::units::SectorRange;
use crate::writable::Volume;

/// The reads of one worker.
pub struct Reader<'a> {
    /// The queue's number, for the log.
    queue: u16,
    volume: &'a Volume,
    sources: Sources<'a>,
    reads: Reads<'a>,
    /// Reads that wait for room in the ring.
    stalled: VecDeque<ReadId>,
    /// Reads that wait for room among the fetches.
    starved: VecDeque<ReadId>,
    /// Reads that are finished and not taken yet.
    finished: Vec<Finished<'a>>,
    plans: Pool<Plan<'a>>,
}

impl<'a> Reader<'a> {
    /// A reader for queue `queue` of `disk`, which waits for storage through `ring` if there is one.
    ///
    /// # Errors
    /// The process has no descriptor left.
    pub fn new(queue: u16, backend: &'a BlockBackend, ring: Option<Ring>) -> io::Result<Self> {
        Ok(Self {
            queue,
            volume: backend.volume(),
            sources: Sources::new(backend, ring)?,
            reads: Reads::default(),
            stalled: VecDeque::new(),
            starved: VecDeque::new(),
            finished: Vec::new(),
            plans: Pool::default(),
        })
    }

    /// The means to reach stored bytes.
    pub fn sources(&self) -> &Sources<'a> {
        &self.sources
    }

    /// Plans a read of a range, which lies on the disk.
    #[inline]
    pub fn plan(&mut self, request: Request<'a>, range: SectorRange) -> Planned<'a> {
        let volume = self.volume;
        let mut plan = self.plans.take(|| Plan::new(volume));
        plan.begin(range);
        Planned { request, plan }
    }

    /// Serves what can be served of a read, and begins the rest. A read that is finished is
    /// returned; others come from [`Reader::finished`] later.
    #[inline]
    pub fn begin(&mut self, planned: Planned<'a>) -> Option<Finished<'a>> {
        let id = self.reads.insert(planned);
        self.go_on(id)
    }

    /// Begins the parts of a read that are left.
    #[inline]
    fn go_on(&mut self, id: ReadId) -> Option<Finished<'a>> {
        let reading = self.reads.get_mut(id)?;
        match self.sources.serve(id, reading) {
            Ok(None) => {}
            Ok(Some(room)) => {
                reading.set_waits_for(Some(room));
                match room {
                    Budget::Own => {}
                    Budget::Ring => self.stalled.push_back(id),
                    Budget::Fetch => self.starved.push_back(id),
                }
                return None;
            }
            Err(error) => self.fail(id, &error),
        }
        self.finish_if_done(id)
    }

    #[cold]
    fn fail(&mut self, id: ReadId, error: &Error) {
        if let Some(reading) = self.reads.get_mut(id) {
            reading.fail();
        }
        let (queue, reason) = (self.queue, reason(error));
        ratelimited_log::warn(format_args!("queue {queue}: a read failed: {reason}"));
    }

    #[inline]
    fn finish_if_done(&mut self, id: ReadId) -> Option<Finished<'a>> {
        let (finished, mut plan) = self.reads.finish_if_done(id)?;
        plan.clear();
        self.plans.give_back(plan);
        Some(finished)
    }

    /// Takes note of a part that was pending.
    fn settle(&mut self, (id, result): PartResult) {
        if matches!(result, Ok(Begun::Pending)) {
            return;
        }
        let Some(reading) = self.reads.get_mut(id) else {
            return;
        };
        reading.part_ended();
        let waits_for_own = reading.waits_for() == Some(Budget::Own);
        if waits_for_own {
            reading.set_waits_for(None);
        }
        if let Err(error) = result {
            self.fail(id, &error);
        }
        let finished = match waits_for_own {
            true => self.go_on(id),
            false => self.finish_if_done(id),
        };
        self.finished.extend(finished);
    }

    /// Takes what storage and the fetcher delivered; returns whether there was anything.
    pub fn take_completions(&mut self) -> bool {
        let mut any = false;
        while let Some(result) = self.sources.ring_completed(&mut self.reads) {
            any = true;
            self.settle(result);
        }
        while let Some(result) = self.sources.fetch_ended(&mut self.reads) {
            any = true;
            self.settle(result);
        }
        if any {
            self.resume();
        }
        // Even without a finished read, the rest of one that came short may have been prepared.
        self.submit();
        any
    }

    /// Lets parts and reads in line go on, as far as there is room.
    fn resume(&mut self) {
        while let Some(result) = self.sources.deferred(&mut self.reads) {
            self.settle(result);
        }
        self.resume_line(Budget::Ring);
        self.resume_line(Budget::Fetch);
    }

    fn resume_line(&mut self, room: Budget) {
        // Once through: a read may get in line again.
        for _ in 0..self.line(room).len() {
            if !self.sources.has_room(room) {
                return;
            }
            let Some(id) = self.line(room).pop_front() else {
                return;
            };
            if let Some(reading) = self.reads.get_mut(id) {
                reading.set_waits_for(None);
            }
            let finished = self.go_on(id);
            self.finished.extend(finished);
        }
    }

    fn line(&mut self, room: Budget) -> &mut VecDeque<ReadId> {
        match room {
            Budget::Fetch => &mut self.starved,
            _ => &mut self.stalled,
        }
    }

    /// Takes one read that is finished.
    pub fn finished(&mut self) -> Option<Finished<'a>> {
        self.finished.pop()
    }

    /// Starts the reads that are prepared; without a working ring, serves them here.
    pub fn submit(&mut self) {
        if let Err(error) = self.sources.submit() {
            self.fall_back(&error);
        }
    }

    /// Waits until a part can go on, at most for `timeout`.
    pub fn wait(&mut self, timeout: Duration) {
        if let Err(error) = self.sources.wait(timeout) {
            self.fall_back(&error);
        }
    }

    /// Goes on without io_uring: from now on the worker reads and waits.
    #[cold]
    fn fall_back(&mut self, error: &io::Error) {
        let queue = self.queue;
        ratelimited_log::error(format_args!(
            "queue {queue}: io_uring failed ({error}); reading with pread from now on"
        ));
        self.sources.drop_ring();
        self.resume();
    }

    /// Gives up all reads that wait for absent bytes: they end as [`Outcome::Open`], once the ring's
    /// reads for them have finished.
    ///
    /// [`Outcome::Open`]: super::request::Outcome::Open
    pub fn give_up_fetches(&mut self) {
        while let Some(pending) = self.sources.give_up() {
            if let Some(reading) = self.reads.get_mut(pending.read) {
                reading.part_ended();
                reading.give_up();
            }
        }
        for id in std::mem::take(&mut self.starved) {
            if let Some(reading) = self.reads.get_mut(id) {
                reading.set_waits_for(None);
                reading.give_up();
            }
        }
        for id in self.reads.ids() {
            let finished = self.finish_if_done(id);
            self.finished.extend(finished);
        }
    }

    /// Whether parts are pending.
    pub fn is_waiting(&self) -> bool {
        self.sources.is_waiting()
    }

    /// Whether the ring reads.
    pub fn is_reading(&self) -> bool {
        let ring = self.sources.ring();
        ring.is_some_and(|ring| ring.under_way() > 0)
    }

    /// Whether absent bytes are waited for.
    pub fn is_fetching(&self) -> bool {
        self.sources.fetches().count() > 0
    }

    /// Whether reads are prepared that could not be started yet.
    pub fn is_backlogged(&mut self) -> bool {
        self.sources.is_backlogged()
    }

    /// Reads that wait for room in the ring.
    pub fn stalled(&self) -> usize {
        self.stalled.len()
    }

    /// Pieces of guest memory that reads under way hold.
    pub fn pieces(&self) -> usize {
        self.reads.pieces()
    }
}
