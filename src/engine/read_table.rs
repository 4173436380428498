//! Table of the active reads of one worker.
#![cfg_attr(not(test), warn(clippy::indexing_slicing))]

use super::read_id::{ReadId, SubreadId};
use super::request::{Finished, Request, RequestEnd};
use super::subreads::{PendingSubread, SubreadState, Subreads};
use crate::virtio::status::Status;

/// A read that is planned, with nothing begun.
#[derive(Debug)]
pub struct Planned<'a> {
    /// The request.
    pub request: Request<'a>,
    /// Its subreads.
    pub subreads: Box<Subreads<'a>>,
}

/// How a read ends once none of its subreads is pending.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// All subreads so far are good.
    Good,
    /// A subread failed.
    Failed,
    /// The queue stops before absent bytes are fetched.
    GivenUp,
}

/// A read that was begun.
#[derive(Debug)]
pub struct ActiveRead<'a> {
    request: Request<'a>,
    subreads: Box<Subreads<'a>>,
    verdict: Verdict,
}

impl<'a> ActiveRead<'a> {
    /// A read with nothing begun.
    #[inline]
    pub fn new(planned: Planned<'a>) -> Self {
        Self {
            request: planned.request,
            subreads: planned.subreads,
            verdict: Verdict::Good,
        }
    }

    /// The request.
    #[inline]
    pub fn request(&self) -> &Request<'a> {
        &self.request
    }

    /// The subreads.
    #[inline]
    pub fn subreads(&self) -> &Subreads<'a> {
        &self.subreads
    }

    /// The subreads, to change them.
    #[inline]
    pub fn subreads_mut(&mut self) -> &mut Subreads<'a> {
        &mut self.subreads
    }

    /// Whether it can still succeed.
    pub fn is_good(&self) -> bool {
        self.verdict == Verdict::Good
    }

    /// Begins no more subreads: one failed.
    pub fn fail(&mut self) {
        self.verdict = Verdict::Failed;
        self.subreads.abandon_plan();
    }

    /// Begins no more subreads: the queue stops.
    pub fn give_up(&mut self) {
        if self.is_good() {
            self.verdict = Verdict::GivenUp;
        }
        self.subreads.abandon_plan();
    }

    /// Ends a read of which no subread is pending. Its subreads can be used again.
    #[inline]
    pub fn finish(self) -> (Finished<'a>, Box<Subreads<'a>>) {
        let end = match self.verdict {
            Verdict::Good => RequestEnd::Answered(Status::Ok),
            Verdict::Failed => RequestEnd::Answered(Status::IoError),
            Verdict::GivenUp => RequestEnd::Open,
        };
        let written = self.request.chain().writable().len();
        (self.request.finish(end, written), self.subreads)
    }

    /// Pieces of guest memory that it holds.
    fn pieces(&self) -> usize {
        self.request.chain().writable().pieces().len()
    }
}

/// The active reads of one worker, by id.
#[derive(Debug, Default)]
pub struct ReadTable<'a> {
    slots: Vec<Option<ActiveRead<'a>>>,
    free: Vec<ReadId>,
    /// Pieces of guest memory that the reads hold.
    pieces: usize,
}

impl<'a> ReadTable<'a> {
    /// Id of the read that is entered next.
    #[inline]
    pub fn vacant(&self) -> ReadId {
        // As many reads as the queue has descriptors, at most 32768.
        let new = ReadId(self.slots.len() as u16);
        self.free.last().copied().unwrap_or(new)
    }

    /// Enters a read with pending subreads, by the id that [`ReadTable::vacant`] returned.
    pub fn insert(&mut self, read: ActiveRead<'a>) {
        self.pieces += read.pieces();
        match self.free.pop() {
            Some(id) => {
                if let Some(slot) = self.slots.get_mut(usize::from(id.0)) {
                    *slot = Some(read);
                }
            }
            None => self.slots.push(Some(read)),
        }
    }

    /// The read of this id, unless it has finished.
    #[inline]
    pub fn get_mut(&mut self, id: ReadId) -> Option<&mut ActiveRead<'a>> {
        self.slots.get_mut(usize::from(id.0))?.as_mut()
    }

    /// The read of this subread, and the subread, if it is pending.
    pub fn pending(&self, id: SubreadId) -> Option<(&ActiveRead<'a>, &PendingSubread)> {
        let read = self.slots.get(usize::from(id.read().0))?.as_ref()?;
        Some((read, read.subreads.pending(id.slot())?))
    }

    /// The ids of all subreads whose state is as `is` says.
    pub fn subreads(
        &self,
        is: impl Fn(&SubreadState) -> bool + Copy,
    ) -> impl Iterator<Item = SubreadId> {
        let reads = (0u16..).zip(&self.slots);
        reads.flat_map(move |(number, slot)| {
            let slots = slot.iter().flat_map(move |read| read.subreads.slots(is));
            slots.map(move |slot| SubreadId::new(ReadId(number), slot))
        })
    }

    /// Removes a read if none of its subreads is pending.
    pub fn take_ended(&mut self, id: ReadId) -> Option<ActiveRead<'a>> {
        let slot = self.slots.get_mut(usize::from(id.0))?;
        let read = slot.take_if(|read| !read.subreads.is_pending())?;
        self.free.push(id);
        self.pieces -= read.pieces();
        Some(read)
    }

    /// Whether no read is active.
    pub fn is_empty(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// Pieces of guest memory that the reads hold.
    pub fn pieces(&self) -> usize {
        self.pieces
    }
}
