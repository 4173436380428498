//! Planned reads on their way to be served, while the processor fetches what serving them needs.
//!
//! A read is planned, then its pages are looked for, then its first bytes are brought into the
//! cache; at each step a few reads wait for the memory to answer. All steps share one queue, in
//! which nothing moves.

use std::collections::VecDeque;

use super::delivery::Delivery;
use super::read_table::Planned;
use crate::io::prefetch;
use crate::source::{Located, PresentRange};

/// Cache lines of a request's memory that are fetched ahead: the hardware follows from there.
const TARGET_LINES: usize = 4;

/// Reads that are planned and not served yet, oldest first.
#[derive(Debug, Default)]
pub struct Prefetch<'a> {
    reads: VecDeque<Planned<'a>>,
    /// Reads at the front whose pages are on their way.
    pages: usize,
    /// Reads at the front, among those, whose first bytes are on their way.
    bytes: usize,
}

impl<'a> Prefetch<'a> {
    /// Adds a read.
    #[inline]
    pub fn push(&mut self, planned: Planned<'a>) {
        self.reads.push_back(planned);
    }

    /// Takes reads from step to step, until no more than `ahead` wait at each; returns the oldest one
    /// if more than that are ready.
    #[inline]
    pub fn next(&mut self, ahead: usize, delivery: &Delivery<'a>) -> Option<Planned<'a>> {
        while self.reads.len() - self.pages > ahead {
            let planned = &mut self.reads[self.pages];
            if let Some(range) = first_range(planned, delivery) {
                range.prefetch_pages();
            }
            self.pages += 1;
        }
        while self.pages - self.bytes > ahead {
            let planned = &mut self.reads[self.bytes];
            if let Some(range) = first_range(planned, delivery) {
                range.prefetch();
            }
            let memory = planned.request.chain().writable();
            if let Some(first) = memory.pieces().first() {
                prefetch::start(*first, TARGET_LINES);
            }
            self.bytes += 1;
        }
        if self.bytes <= ahead {
            return None;
        }
        (self.pages, self.bytes) = (self.pages - 1, self.bytes - 1);
        self.reads.pop_front()
    }
}

/// The stored bytes of a read's first subread, if it has some and they are present.
fn first_range<'t>(
    planned: &'t mut Planned<'_>,
    delivery: &'t Delivery<'_>,
) -> Option<PresentRange<'t>> {
    let (subread, _) = planned.subreads.peek()?;
    match delivery.locate(&subread, planned.subreads.lookup())? {
        Located::Present(range) => Some(range),
        Located::Absent(_) => None,
    }
}
