//! Subreads of absent bytes: the fetcher is asked for them, and the worker goes on.
//!
//! They have a budget of their own beside the ring's, so that reads of absent bytes never take the
//! room of reads of present ones.
#![cfg_attr(not(test), warn(clippy::indexing_slicing))]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::rc::Rc;
use std::sync::Arc;

use super::read_id::SubreadId;
use crate::image::Error;
use crate::source::refetch::FetchCount;
use crate::source::{AbsentRange, FetchError, Fetched, Ticket, Waker};

/// Most subreads of one worker that are fetched at a time.
pub const MAX_UNDER_WAY: usize = 64;

/// The fetches of one worker.
#[derive(Debug)]
pub struct Fetches {
    waker: Arc<Waker>,
    /// One clone for each subread that is being fetched.
    permits: Rc<()>,
    /// Subreads that wait for a permit, oldest first.
    queue: VecDeque<SubreadId>,
    /// Number of fetches begun so far.
    begun: u64,
    /// Results taken from the waker and not handled yet.
    results: Vec<Fetched>,
}

/// A subread that the fetcher was asked for. It holds one permit until it is dropped.
#[derive(Debug)]
pub struct Fetching {
    ticket: Ticket,
    count: FetchCount,
    _permit: Rc<()>,
}

impl Fetching {
    /// Whether `ticket` is the ticket of this fetch, rather than that of one given up.
    pub fn has_ticket(&self, ticket: Ticket) -> bool {
        self.ticket == ticket
    }
}

impl Fetches {
    /// No fetch.
    ///
    /// # Errors
    ///
    /// The process has no descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            waker: Waker::new()?,
            permits: Rc::new(()),
            queue: VecDeque::new(),
            begun: 0,
            results: Vec::new(),
        })
    }

    /// Descriptor that is readable when a fetch has ended.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.waker.as_fd()
    }

    /// Number of subreads that are being fetched.
    pub fn under_way(&self) -> usize {
        Rc::strong_count(&self.permits) - 1
    }

    /// Asks the fetcher for `range`, the bytes of subread `id`. Without a permit the subread is queued, and
    /// `None` returned.
    pub fn begin(&mut self, id: SubreadId, range: &AbsentRange<'_>) -> Option<Fetching> {
        if self.under_way() >= MAX_UNDER_WAY {
            self.queue.push_back(id);
            return None;
        }
        Some(self.request(id, range, FetchCount::FIRST))
    }

    /// Asks again for the bytes of subread `id`, which are absent after a fetch with this result.
    ///
    /// # Errors
    ///
    /// The fetch failed, or was the last that [`FetchCount`] allows.
    pub fn retry(
        &mut self,
        id: SubreadId,
        range: &AbsentRange<'_>,
        ended: &Fetching,
        result: Result<(), FetchError>,
    ) -> Result<Fetching, Error> {
        let count = result.and_then(|()| ended.count.next());
        let count = count.map_err(|error| range.error(error))?;
        Ok(self.request(id, range, count))
    }

    fn request(&mut self, id: SubreadId, range: &AbsentRange<'_>, count: FetchCount) -> Fetching {
        // A fetch that was given up may still end, so each has a ticket of its own.
        let ticket = Ticket(self.begun << SubreadId::BITS | u64::from(id.to_bits()));
        self.begun += 1;
        range.request(&self.waker, ticket);
        Fetching {
            ticket,
            count,
            _permit: self.permits.clone(),
        }
    }

    /// Takes the result of one fetch that has ended. The fetch may have been given up.
    pub fn next_result(&mut self) -> Option<(SubreadId, Fetched)> {
        if self.under_way() == 0 {
            return None;
        }
        if self.results.is_empty() {
            self.waker.take(&mut self.results);
        }
        let fetched = self.results.pop()?;
        // The ticket's lower bits.
        let id = SubreadId::from_bits(fetched.ticket.0 as u32);
        Some((id, fetched))
    }

    /// Takes the oldest queued subread, if there is a permit for it.
    pub fn next_queued(&mut self) -> Option<SubreadId> {
        match self.under_way() < MAX_UNDER_WAY {
            true => self.queue.pop_front(),
            false => None,
        }
    }

    /// Takes all queued subreads, to give them up.
    pub fn take_queue(&mut self) -> VecDeque<SubreadId> {
        std::mem::take(&mut self.queue)
    }
}
