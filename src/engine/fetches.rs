//! Parts whose stored bytes are absent: asked for, and waited for while the worker goes on.
//!
//! They have a budget of their own beside the ring's, so that reads of absent bytes never take the
//! room of reads of present ones.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use super::reading::PendingPart;
use crate::image::Error;
use crate::source::{AbsentRange, FetchError, FetchErrorKind, Fetched, Ticket, Waker};

/// Parts that are fetched at a time, per worker.
pub const MAX_FETCHES: usize = 64;

/// How often a part is accepted that was fetched and is absent again.
const MAX_ROUNDS: u32 = 8;

/// A part that is being fetched.
#[derive(Debug)]
struct Fetch {
    ticket: Ticket,
    pending: PendingPart,
    rounds: u32,
}

/// A fetch that has ended.
#[derive(Debug)]
pub struct EndedFetch {
    /// The part that was fetched.
    pub pending: PendingPart,
    rounds: u32,
    result: Result<(), FetchError>,
}

/// The fetches of one worker.
#[derive(Debug)]
pub struct Fetches {
    waker: Arc<Waker>,
    slots: Vec<Option<Fetch>>,
    count: usize,
    /// The next ticket. A fetch that is given up may still end, so no ticket is used twice.
    next: u64,
    /// Outcomes taken from the waker and not handled yet.
    outcomes: Vec<Fetched>,
}

impl Fetches {
    /// No fetch.
    ///
    /// # Errors
    /// The process has no descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            waker: Waker::new()?,
            slots: (0..MAX_FETCHES).map(|_| None).collect(),
            count: 0,
            next: 0,
            outcomes: Vec::new(),
        })
    }

    /// Readable when a fetch has ended.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.waker.as_fd()
    }

    /// Fetches under way.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Whether one more fetch can be begun.
    pub fn has_room(&self) -> bool {
        self.count < MAX_FETCHES
    }

    /// Begins to fetch `range` for `pending`; returns whether there was room.
    pub fn begin(&mut self, range: &AbsentRange<'_>, pending: PendingPart) -> bool {
        self.request(range, pending, 0)
    }

    /// Begins to fetch the part of `ended` again, whose bytes are still absent.
    ///
    /// # Errors
    /// The fetch failed, or succeeded too often without effect.
    pub fn again(&mut self, range: &AbsentRange<'_>, ended: EndedFetch) -> Result<(), Error> {
        ended.result.map_err(|error| range.error(error))?;
        let (pending, rounds) = (ended.pending, ended.rounds + 1);
        // The ended fetch left room.
        if rounds < MAX_ROUNDS && self.request(range, pending, rounds) {
            return Ok(());
        }
        let reason = format!("bytes are missing from the cache after {MAX_ROUNDS} fetches");
        let error = FetchError::new(FetchErrorKind::Damaged, reason);
        Err(range.error(error).into())
    }

    fn request(&mut self, range: &AbsentRange<'_>, pending: PendingPart, rounds: u32) -> bool {
        let Some(slot) = self.slots.iter_mut().find(|slot| slot.is_none()) else {
            return false;
        };
        let ticket = Ticket(self.next);
        *slot = Some(Fetch {
            ticket,
            pending,
            rounds,
        });
        self.next += 1;
        self.count += 1;
        range.request(&self.waker, ticket);
        true
    }

    /// Takes one fetch that has ended, if there is one.
    pub fn ended(&mut self) -> Option<EndedFetch> {
        if self.count == 0 {
            return None;
        }
        loop {
            if self.outcomes.is_empty() {
                self.waker.take(&mut self.outcomes);
            }
            let Fetched { ticket, result } = self.outcomes.pop()?;
            let named = |slot: &&mut Option<Fetch>| {
                let fetch = slot.as_ref();
                fetch.is_some_and(|fetch| fetch.ticket == ticket)
            };
            let fetch = self.slots.iter_mut().find(named).and_then(Option::take);
            if let Some(Fetch {
                pending, rounds, ..
            }) = fetch
            {
                self.count -= 1;
                return Some(EndedFetch {
                    pending,
                    rounds,
                    result,
                });
            }
        }
    }

    /// Gives up one fetch, if there is one; what comes of it is ignored.
    pub fn give_up(&mut self) -> Option<PendingPart> {
        let fetch = self.slots.iter_mut().find_map(Option::take)?;
        self.count -= 1;
        Some(fetch.pending)
    }
}
