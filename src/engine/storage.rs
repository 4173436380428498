//! Subreads of present bytes that are not in memory: the ring reads them, and the worker goes on.
#![cfg_attr(not(test), warn(clippy::indexing_slicing))]

use std::collections::VecDeque;
use std::io;

use super::read_id::SubreadId;
use super::ring::{Completion, Ring};
use super::subreads::SubreadState;
use crate::source::{self, PresentRange};

/// The reads of storage of one worker.
#[derive(Debug)]
pub struct Storage {
    /// `None` if the worker got no ring, or its ring failed: then it reads with `pread`.
    ring: Option<Ring>,
    /// Subreads that wait for room in the ring, oldest first.
    queue: VecDeque<SubreadId>,
}

impl Storage {
    /// Reads through `ring`, if there is one.
    pub fn new(ring: Option<Ring>) -> Self {
        Self {
            ring,
            queue: VecDeque::new(),
        }
    }

    /// The ring.
    pub fn ring(&self) -> Option<&Ring> {
        self.ring.as_ref()
    }

    /// Begins to read `range`, the bytes of subread `id`, by the ring. Without room in it the subread
    /// is queued. `None` without a ring.
    ///
    /// # Errors
    ///
    /// The ring does not take the read.
    pub fn begin(
        &mut self,
        id: SubreadId,
        range: PresentRange<'_>,
    ) -> Option<Result<SubreadState, source::Error>> {
        let ring = self.ring.as_mut()?;
        if !ring.has_room() {
            self.queue.push_back(id);
            return Some(Ok(SubreadState::Queued));
        }
        let buffer = ring.buffer(range.len());
        Some(self.read(id, range, buffer, 0))
    }

    /// Begins to read the rest of `range` into `buffer`, of which the first `filled` bytes are read.
    ///
    /// # Errors
    ///
    /// The ring does not take the read.
    pub fn read(
        &mut self,
        id: SubreadId,
        range: PresentRange<'_>,
        buffer: Vec<u8>,
        filled: usize,
    ) -> Result<SubreadState, source::Error> {
        let offset = range.offset() + filled as u64;
        let begun = match &mut self.ring {
            Some(ring) => ring.read(id.to_bits(), range.descriptor(), offset, buffer, filled),
            None => Err(io::ErrorKind::ResourceBusy.into()),
        };
        begun.map_err(|error| range.failed(error))?;
        Ok(SubreadState::Reading { filled })
    }

    /// Takes one read that the ring has finished.
    pub fn next_completion(&mut self) -> Option<(SubreadId, Completion)> {
        let completion = self.ring.as_mut()?.completed()?;
        Some((SubreadId::from_bits(completion.tag), completion))
    }

    /// Keeps a buffer of a completion for reuse.
    pub fn recycle(&mut self, buffer: Vec<u8>) {
        if let Some(ring) = &mut self.ring {
            ring.recycle(buffer);
        }
    }

    /// Takes the oldest queued subread, if there is room for it.
    pub fn next_queued(&mut self) -> Option<SubreadId> {
        match self.ring.as_ref().is_none_or(Ring::has_room) {
            true => self.queue.pop_front(),
            false => None,
        }
    }

    /// Number of subreads that wait for room in the ring.
    pub fn queued(&self) -> usize {
        self.queue.len()
    }

    /// Goes on without the ring, which failed. `reading` are the subreads that it was reading.
    pub fn abandon_ring(&mut self, reading: Vec<SubreadId>) {
        if let Some(ring) = self.ring.take() {
            ring.abandon();
        }
        self.queue.extend(reading);
    }

    /// Whether the ring reads.
    pub fn is_reading(&self) -> bool {
        self.ring.as_ref().is_some_and(|ring| ring.under_way() > 0)
    }

    /// Whether the kernel has not taken all reads that were begun.
    pub fn is_backlogged(&mut self) -> bool {
        self.ring.as_mut().is_some_and(Ring::is_backlogged)
    }

    /// Submits the reads that were begun.
    ///
    /// # Errors
    ///
    /// The ring fails.
    pub fn submit(&mut self) -> io::Result<()> {
        self.ring.as_mut().map_or(Ok(()), Ring::submit)
    }

    /// Waits for at least one read of the ring to finish; returns at once if it reads nothing.
    ///
    /// # Errors
    ///
    /// The ring fails.
    pub fn wait(&mut self) -> io::Result<()> {
        match &mut self.ring {
            Some(ring) if ring.under_way() > 0 => ring.wait(),
            _ => Ok(()),
        }
    }
}
