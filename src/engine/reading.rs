//! Reads under way, and the parts of them that are being read or fetched.

use super::plan::{Plan, ReadPart};
use super::request::{Finished, Outcome, Request};
use crate::virtio::status::Status;

/// A read that is planned, with nothing begun.
#[derive(Debug)]
pub struct Planned<'a> {
    /// The request.
    pub request: Request<'a>,
    /// Its parts.
    pub plan: Box<Plan<'a>>,
}

/// Names a read under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadId(u16);

/// A part whose bytes are being read or fetched.
#[derive(Clone, Copy, Debug)]
pub struct PendingPart {
    /// The read that it is a part of.
    pub read: ReadId,
    /// The source of its bytes.
    pub part: ReadPart,
    /// Byte of the request's data that it fills first.
    pub position: usize,
}

/// A budget that is used up: what a read waits for to begin its next part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Budget {
    /// The parts of one read that may be pending.
    Own,
    /// The reads of the ring.
    Ring,
    /// The fetches.
    Fetch,
}

/// How far a read went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// All is well.
    Good,
    /// A part could not be served.
    Failed,
    /// The queue stops before the absent bytes are fetched.
    GivenUp,
}

/// A read of which parts may be under way.
#[derive(Debug)]
pub struct Reading<'a> {
    request: Request<'a>,
    plan: Box<Plan<'a>>,
    pending: usize,
    waits_for: Option<Budget>,
    state: State,
}

impl<'a> Reading<'a> {
    /// The request.
    pub fn request(&self) -> &Request<'a> {
        &self.request
    }

    /// The parts that are left to begin.
    pub fn plan(&self) -> &Plan<'a> {
        &self.plan
    }

    /// The request, and the parts that are left to begin.
    pub fn split(&mut self) -> (&Request<'a>, &mut Plan<'a>) {
        (&self.request, &mut self.plan)
    }

    /// Parts that are being read or fetched.
    pub fn pending(&self) -> usize {
        self.pending
    }

    /// Notes that one more part is being read or fetched.
    pub fn part_begun(&mut self) {
        self.pending += 1;
    }

    /// Notes that a part is served or failed.
    pub fn part_ended(&mut self) {
        self.pending -= 1;
    }

    /// Makes the read wait for room, or go on.
    pub fn set_waits_for(&mut self, room: Option<Budget>) {
        self.waits_for = room;
    }

    /// What the read waits for to begin its next part.
    pub fn waits_for(&self) -> Option<Budget> {
        self.waits_for
    }

    /// Begins no more parts: one failed.
    pub fn fail(&mut self) {
        self.state = State::Failed;
        self.plan.abandon();
    }

    /// Begins no more parts: the queue stops.
    pub fn give_up(&mut self) {
        if self.state == State::Good {
            self.state = State::GivenUp;
        }
        if self.waits_for == Some(Budget::Own) {
            self.waits_for = None;
        }
        self.plan.abandon();
    }

    fn is_done(&self) -> bool {
        self.pending == 0 && self.waits_for.is_none()
    }
}

/// The reads under way of one worker.
#[derive(Debug, Default)]
pub struct Reads<'a> {
    slots: Vec<Option<Reading<'a>>>,
    free: Vec<ReadId>,
    /// Pieces of guest memory that the reads hold.
    pieces: usize,
}

impl<'a> Reads<'a> {
    /// Begins a read.
    #[inline]
    pub fn insert(&mut self, planned: Planned<'a>) -> ReadId {
        let Planned { request, plan } = planned;
        self.pieces += pieces(&request);
        let reading = Some(Reading {
            request,
            plan,
            pending: 0,
            waits_for: None,
            state: State::Good,
        });
        match self.free.pop() {
            Some(id) => {
                self.slots[usize::from(id.0)] = reading;
                id
            }
            None => {
                // As many reads as the queue has descriptors, at most 32768.
                let id = ReadId(self.slots.len() as u16);
                self.slots.push(reading);
                id
            }
        }
    }

    /// The read of this name, unless it is over.
    #[inline]
    pub fn get_mut(&mut self, id: ReadId) -> Option<&mut Reading<'a>> {
        self.slots.get_mut(usize::from(id.0))?.as_mut()
    }

    /// The names of all reads under way.
    pub fn ids(&self) -> Vec<ReadId> {
        let slots = self.slots.iter().zip(0..);
        let taken = slots.filter_map(|(slot, id)| slot.as_ref().map(|_| ReadId(id)));
        taken.collect()
    }

    /// Ends a read if nothing of it is under way or left to begin. Its plan can be used again.
    #[inline]
    pub fn finish_if_done(&mut self, id: ReadId) -> Option<(Finished<'a>, Box<Plan<'a>>)> {
        let slot = self.slots.get_mut(usize::from(id.0))?;
        let reading = slot.take_if(|reading| reading.is_done())?;
        self.free.push(id);
        let Reading {
            request,
            plan,
            state,
            ..
        } = reading;
        self.pieces -= pieces(&request);
        let outcome = match state {
            State::Good => Outcome::Answered(Status::Ok),
            State::Failed => Outcome::Answered(Status::IoError),
            State::GivenUp => Outcome::Open,
        };
        let touched = request.chain().writable().len();
        Some((request.finish(outcome, touched), plan))
    }

    /// Pieces of guest memory that the reads hold.
    pub fn pieces(&self) -> usize {
        self.pieces
    }
}

fn pieces(request: &Request<'_>) -> usize {
    request.chain().writable().pieces().len()
}
