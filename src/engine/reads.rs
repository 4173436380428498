//! Reads of one worker: served at once if their bytes are in memory, finished later if the bytes must
//! be read or fetched first.
#![cfg_attr(not(test), warn(clippy::indexing_slicing))]

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use super::BlockBackend;
use super::data_path::{DataPath, Step};
use super::delivery::Delivery;
use super::pool::Pool;
use super::read_id::{ReadId, SubreadId};
use super::read_table::{ActiveRead, Planned, ReadTable};
use super::request::{Finished, Request};
use super::ring::Ring;
use super::stats::queue::QueueStats;
use super::subreads::{PendingSubread, SubreadState, Subreads};
use crate::image::Error;
use crate::ratelimited_log;
use crate::reason::reason;
use crate::units::SectorRange;
use crate::writable::Volume;

/// The reads of one worker.
pub struct Reads<'a> {
    /// The queue's number, for the log.
    queue: u16,
    volume: &'a Volume,
    path: DataPath<'a>,
    table: ReadTable<'a>,
    /// Reads that finished after [`Reads::begin`], for the worker to take.
    finished: Vec<Finished<'a>>,
    /// Subreads of finished reads, for reuse.
    spare: Pool<Subreads<'a>>,
}

impl<'a> Reads<'a> {
    /// No read, for queue `queue` of `backend`, which reads storage through `ring` if there is one, and counts
    /// in `stats`.
    ///
    /// # Errors
    ///
    /// The process has no descriptor left.
    pub fn new(
        queue: u16,
        backend: &'a BlockBackend,
        stats: QueueStats<'a>,
        ring: Option<Ring>,
    ) -> io::Result<Self> {
        Ok(Self {
            queue,
            volume: backend.volume(),
            path: DataPath::new(backend, stats, ring)?,
            table: ReadTable::default(),
            finished: Vec::new(),
            spare: Pool::default(),
        })
    }

    /// Copies and decodes bytes.
    #[inline]
    pub fn delivery(&self) -> &Delivery<'a> {
        self.path.delivery()
    }

    /// Moves the counts of reads to the statistics page.
    #[inline]
    pub fn publish_counts(&mut self) {
        self.path.publish_counts();
    }

    /// The ring, if there is one.
    pub fn ring(&self) -> Option<&Ring> {
        self.path.storage().ring()
    }

    /// Descriptor that is readable when a fetch has ended.
    pub fn fetch_descriptor(&self) -> BorrowedFd<'_> {
        self.path.fetches().descriptor()
    }

    /// Plans a read of a range, which lies on the disk.
    #[inline]
    pub fn plan(&mut self, request: Request<'a>, range: SectorRange) -> Planned<'a> {
        let volume = self.volume;
        let mut subreads = self.spare.take(|| Subreads::new(volume));
        subreads.plan(range);
        Planned { request, subreads }
    }

    /// Begins a read. Returns it if it has finished; otherwise it comes from [`Reads::next_finished`]
    /// later.
    #[inline]
    pub fn begin(&mut self, planned: Planned<'a>) -> Option<Finished<'a>> {
        let mut read = ActiveRead::new(planned);
        if let Err(error) = self.path.advance(self.table.vacant(), &mut read) {
            fail(self.queue, &mut read, &error);
        }
        if read.subreads().is_pending() {
            self.table.insert(read);
            return None;
        }
        Some(self.finish(read))
    }

    /// Begins the subreads to come of a read in the table; returns it if it has finished.
    fn advance(&mut self, id: ReadId) -> Option<Finished<'a>> {
        let read = self.table.get_mut(id)?;
        if let Err(error) = self.path.advance(id, read) {
            fail(self.queue, read, &error);
        }
        let read = self.table.take_ended(id)?;
        Some(self.finish(read))
    }

    /// Finishes a read of which no subread is pending.
    #[inline(always)]
    fn finish(&mut self, read: ActiveRead<'a>) -> Finished<'a> {
        let (finished, mut subreads) = read.finish();
        subreads.clear();
        self.spare.give_back(subreads);
        finished
    }

    /// Enters the outcome of a step of a pending subread, and goes on with its read.
    fn complete_step(&mut self, id: SubreadId, step: Result<Step, Error>) {
        match step {
            Ok(Step::Pending(state)) => self.set_state(id, state),
            Ok(Step::Served) => self.end_subread(id),
            Err(error) => {
                if let Some(read) = self.table.get_mut(id.read()) {
                    fail(self.queue, read, &error);
                }
                self.end_subread(id);
            }
        }
    }

    fn set_state(&mut self, id: SubreadId, state: SubreadState) {
        if let Some(read) = self.table.get_mut(id.read()) {
            read.subreads_mut().set_state(id.slot(), state);
        }
    }

    /// Removes a pending subread, and goes on with its read unless another subread is queued.
    fn end_subread(&mut self, id: SubreadId) {
        let Some(read) = self.table.get_mut(id.read()) else {
            return;
        };
        let subreads = read.subreads_mut();
        subreads.remove(id.slot());
        if !subreads.is_queued() {
            let finished = self.advance(id.read());
            self.finished.extend(finished);
        }
    }

    /// Takes the results of the ring and of the fetcher; returns whether there were any.
    pub fn take_results(&mut self) -> bool {
        let mut any = false;
        while let Some((id, completion)) = self.path.storage_mut().next_completion() {
            any = true;
            let Some((read, pending)) = self.table.pending(id) else {
                continue;
            };
            let SubreadState::Reading { filled } = pending.state else {
                continue;
            };
            let path = &mut self.path;
            let step = path.read_completed(id, completion, pending, filled, read);
            self.complete_step(id, step);
        }
        while let Some((id, fetched)) = self.path.fetches_mut().next_result() {
            let Some((read, pending)) = self.table.pending(id) else {
                continue;
            };
            let fetching = match &pending.state {
                SubreadState::Fetching(fetching) if fetching.has_ticket(fetched.ticket) => fetching,
                // It was given up.
                _ => continue,
            };
            any = true;
            let path = &mut self.path;
            let step = path.fetch_ended(id, fetched.result, pending, fetching, read);
            self.complete_step(id, step);
        }
        self.begin_queued();
        // Also without a result: a read that came short may have begun to read its rest.
        self.submit();
        any
    }

    /// Begins queued subreads, as far as there is room.
    fn begin_queued(&mut self) {
        while let Some(id) = self.path.next_queued() {
            let Some((read, pending)) = self.table.pending(id) else {
                continue;
            };
            if !read.is_good() {
                // Another subread failed or was given up.
                self.end_subread(id);
                continue;
            }
            let PendingSubread {
                subread, position, ..
            } = pending;
            let step = self.path.begin(id, subread, *position, read);
            self.complete_step(id, step);
        }
    }

    /// Takes one read that finished after [`Reads::begin`].
    pub fn next_finished(&mut self) -> Option<Finished<'a>> {
        self.finished.pop()
    }

    /// Submits the reads that the ring was given. If the ring fails, reads with `pread`.
    pub fn submit(&mut self) {
        if let Err(error) = self.path.storage_mut().submit() {
            self.fall_back(&error);
        }
    }

    /// Waits until a pending subread can go on, at most for `timeout`.
    pub fn wait(&mut self, timeout: Duration) {
        if let Err(error) = self.path.wait(timeout) {
            self.fall_back(&error);
        }
    }

    /// Goes on without io_uring: from now on the worker reads with `pread`, and waits.
    #[cold]
    fn fall_back(&mut self, error: &io::Error) {
        let queue = self.queue;
        ratelimited_log::error(format_args!(
            "queue {queue}: io_uring failed ({error}); reading with pread from now on"
        ));
        let is_reading = |state: &SubreadState| matches!(state, SubreadState::Reading { .. });
        let reading: Vec<_> = self.table.subreads(is_reading).collect();
        for id in &reading {
            self.set_state(*id, SubreadState::Queued);
        }
        self.path.storage_mut().abandon_ring(reading);
        self.begin_queued();
    }

    /// Gives up all reads that wait for absent bytes. They end as
    /// [`RequestEnd::Open`](super::request::RequestEnd::Open), once the ring has finished its reads for them.
    pub fn give_up_fetches(&mut self) {
        let is_fetching = |state: &SubreadState| matches!(state, SubreadState::Fetching(_));
        let mut given_up: Vec<_> = self.table.subreads(is_fetching).collect();
        given_up.extend(self.path.fetches_mut().take_queue());
        for id in given_up {
            if let Some(read) = self.table.get_mut(id.read()) {
                read.give_up();
            }
            self.end_subread(id);
        }
    }

    /// Whether a read has begun and not finished.
    pub fn is_active(&self) -> bool {
        !self.table.is_empty()
    }

    /// Whether the ring reads.
    pub fn is_reading(&self) -> bool {
        self.path.storage().is_reading()
    }

    /// Whether absent bytes are waited for.
    pub fn is_fetching(&self) -> bool {
        self.path.fetches().under_way() > 0
    }

    /// Whether the kernel has not taken all reads that the ring was given.
    pub fn is_backlogged(&mut self) -> bool {
        self.path.storage_mut().is_backlogged()
    }

    /// Number of subreads that wait for room in the ring.
    pub fn queued_for_ring(&self) -> usize {
        self.path.storage().queued()
    }

    /// Pieces of guest memory that active reads hold.
    pub fn pieces(&self) -> usize {
        self.table.pieces()
    }
}

/// Records and logs that a subread of `read` failed.
#[cold]
fn fail(queue: u16, read: &mut ActiveRead<'_>, error: &Error) {
    read.fail();
    let reason = reason(error);
    ratelimited_log::warn(format_args!("queue {queue}: a read failed: {reason}"));
}
