//! Prefetches into the processor's cache for planned reads.
//!
//! A planned read passes two steps before it is served: prefetch of the bits that tell which pages are in
//! memory, and prefetch of its first bytes. A few reads wait after each step, so that memory has time to
//! answer. All reads are in one queue; a step is a position in it.
#![cfg_attr(not(test), warn(clippy::indexing_slicing))]

use std::collections::VecDeque;

use super::delivery::Delivery;
use super::read_table::Planned;
use crate::io::prefetch;
use crate::source::{Located, PresentRange};

/// Cache lines of a request's memory to prefetch. The hardware prefetcher continues from there.
const TARGET_LINES: usize = 4;

/// Planned reads, oldest first.
#[derive(Debug, Default)]
pub struct Prefetch<'a> {
    reads: VecDeque<Planned<'a>>,
    /// Number of reads at the front that have passed the first step.
    pages: usize,
    /// Number of reads at the front that have passed the second step.
    bytes: usize,
}

impl<'a> Prefetch<'a> {
    /// Adds a read.
    #[inline]
    pub fn push(&mut self, planned: Planned<'a>) {
        self.reads.push_back(planned);
    }

    /// Advances reads until at most `ahead` wait before each step; then takes the oldest one, if more than
    /// `ahead` have passed both.
    #[inline]
    pub fn next(&mut self, ahead: usize, delivery: &Delivery<'a>) -> Option<Planned<'a>> {
        while self.reads.len() - self.pages > ahead {
            let planned = self.reads.get_mut(self.pages);
            if let Some(range) = planned.and_then(|planned| first_range(planned, delivery)) {
                range.prefetch_pages();
            }
            self.pages += 1;
        }
        while self.pages - self.bytes > ahead {
            if let Some(planned) = self.reads.get_mut(self.bytes) {
                if let Some(range) = first_range(planned, delivery) {
                    range.prefetch();
                }
                let memory = planned.request.chain().writable();
                if let Some(first) = memory.pieces().first() {
                    prefetch::start(*first, TARGET_LINES);
                }
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

/// Stored bytes of the first subread, if it has some and they are present.
fn first_range<'t>(
    planned: &'t mut Planned<'_>,
    delivery: &'t Delivery<'_>,
) -> Option<PresentRange<'t>> {
    planned.subreads.prepare();
    let (subread, _) = planned.subreads.next()?;
    match delivery.locate(subread, planned.subreads.lookup())? {
        Located::Present(range) => Some(range),
        Located::Absent(_) => None,
    }
}
