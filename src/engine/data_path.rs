//! Ways of a subread's bytes into guest memory, from the fastest to the slowest: memory, page cache,
//! io_uring, and the fetcher for absent bytes.
#![cfg_attr(not(test), warn(clippy::indexing_slicing))]

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::BlockBackend;
use super::delivery::Delivery;
use super::fetches::{Fetches, Fetching};
use super::read_id::{ReadId, SubreadId};
use super::read_plan::Subread;
use super::read_table::ActiveRead;
use super::ring::{Completion, Ring, is_passing};
use super::stats::queue::QueueStats;
use super::storage::Storage;
use super::subreads::{PendingSubread, SubreadState};
use crate::image::Error;
use crate::io::scatter::Cursor;
use crate::source::{FetchError, Located, PresentRange};

/// What came of a step of a subread.
#[derive(Debug)]
pub enum Step {
    /// Its bytes are in guest memory.
    Served,
    /// Its bytes are to come.
    Pending(SubreadState),
}

/// The data path of one worker.
pub struct DataPath<'a> {
    delivery: Delivery<'a>,
    storage: Storage,
    fetches: Fetches,
}

impl<'a> DataPath<'a> {
    /// Data path of `backend`, which reads storage through `ring` if there is one, and counts in `stats`.
    ///
    /// # Errors
    ///
    /// The process has no descriptor left.
    pub fn new(
        backend: &'a BlockBackend,
        stats: QueueStats<'a>,
        ring: Option<Ring>,
    ) -> io::Result<Self> {
        Ok(Self {
            delivery: Delivery::new(backend, stats),
            storage: Storage::new(ring),
            fetches: Fetches::new()?,
        })
    }

    /// Copies and decodes bytes.
    #[inline]
    pub fn delivery(&self) -> &Delivery<'a> {
        &self.delivery
    }

    /// Moves the counts of reads to the statistics page.
    #[inline]
    pub fn publish_counts(&mut self) {
        self.delivery.publish_counts();
    }

    /// Reads of storage.
    pub fn storage(&self) -> &Storage {
        &self.storage
    }

    /// Reads of storage, to submit and to abandon them.
    pub fn storage_mut(&mut self) -> &mut Storage {
        &mut self.storage
    }

    /// Fetches of absent bytes.
    pub fn fetches(&self) -> &Fetches {
        &self.fetches
    }

    /// Fetches of absent bytes, to take their results and to give them up.
    pub fn fetches_mut(&mut self) -> &mut Fetches {
        &mut self.fetches
    }

    /// Serves or begins the subreads to come of a read, until one of them is queued or no more may be
    /// pending.
    ///
    /// # Errors
    ///
    /// A subread failed, or the image tables are lost.
    #[inline]
    pub fn advance(&mut self, id: ReadId, read: &mut ActiveRead<'a>) -> Result<(), Error> {
        loop {
            read.subreads_mut().prepare();
            let Some((subread, position)) = read.subreads().next() else {
                break;
            };
            let Some(slot) = read.subreads().vacant_slot() else {
                break;
            };
            let begun = self.begin(SubreadId::new(id, slot), subread, position, read)?;
            let taken = read.subreads_mut().take();
            if let (Step::Pending(state), Some(subread)) = (begun, taken) {
                let is_queued = matches!(state, SubreadState::Queued);
                let pending = PendingSubread {
                    subread,
                    position,
                    state,
                };
                read.subreads_mut().insert(slot, pending);
                if is_queued {
                    break;
                }
            }
        }
        // A look-up in lost image tables may have found a wrong place.
        self.delivery.image().check_tables()
    }

    /// Serves a subread if its bytes are in memory, and begins to read or to fetch them otherwise.
    ///
    /// # Errors
    ///
    /// The subread failed.
    #[inline]
    pub fn begin(
        &mut self,
        id: SubreadId,
        subread: &Subread,
        position: usize,
        read: &ActiveRead<'a>,
    ) -> Result<Step, Error> {
        loop {
            let mut cursor = read.request().chain().writable().cursor(position);
            let range = match self.delivery.locate(subread, read.subreads().lookup()) {
                Some(Located::Present(range)) => range,
                Some(Located::Absent(range)) => {
                    let begun = self.fetches.begin(id, &range);
                    let state = begun.map_or(SubreadState::Queued, SubreadState::Fetching);
                    return Ok(Step::Pending(state));
                }
                None => {
                    cursor.zero(subread.len() as usize);
                    return Ok(Step::Served);
                }
            };
            let step = match self.delivery.from_memory(subread, range, cursor) {
                Ok(true) => return Ok(Step::Served),
                Ok(false) => self.read(id, subread, range, cursor),
                Err(error) => Err(error),
            };
            match step {
                // The next round finds the bytes absent, and fetches them.
                Err(Error::Block { .. }) if range.reject() => {}
                step => return step,
            }
        }
    }

    /// Serves a subread from the page cache, or begins to read it by the ring. Without a ring, reads it
    /// and waits.
    fn read(
        &mut self,
        id: SubreadId,
        subread: &Subread,
        range: PresentRange<'_>,
        cursor: Cursor<'_, '_>,
    ) -> Result<Step, Error> {
        let has_ring = self.storage.ring().is_some();
        if has_ring && self.delivery.from_page_cache(subread, range, cursor)? {
            return Ok(Step::Served);
        }
        if let Some(begun) = self.storage.begin(id, range) {
            return Ok(Step::Pending(begun?));
        }
        self.delivery.from_storage(subread, range, cursor)?;
        Ok(Step::Served)
    }

    /// Delivers the bytes of a read that the ring has finished. `filled` bytes were read before it.
    ///
    /// # Errors
    ///
    /// The subread failed.
    pub fn read_completed(
        &mut self,
        id: SubreadId,
        completion: Completion,
        pending: &PendingSubread,
        filled: usize,
        read: &ActiveRead<'a>,
    ) -> Result<Step, Error> {
        let PendingSubread {
            subread, position, ..
        } = pending;
        let located = self.delivery.locate(subread, read.subreads().lookup());
        let Some(Located::Present(range)) = located else {
            // Another queue found the bytes damaged meanwhile.
            return self.begin(id, subread, *position, read);
        };
        let Completion { result, buffer, .. } = completion;
        let filled = match result {
            Ok(0) => return Err(range.short(filled).into()),
            Ok(count) => filled + count,
            Err(error) if is_passing(&error) => filled,
            Err(error) => return Err(range.failed(error).into()),
        };
        if filled < range.len() {
            return Ok(Step::Pending(self.storage.read(id, range, buffer, filled)?));
        }
        let cursor = read.request().chain().writable().cursor(*position);
        let delivered = self.delivery.from_bytes(subread, range, &buffer, cursor);
        self.storage.recycle(buffer);
        match delivered {
            Ok(()) => Ok(Step::Served),
            Err(Error::Block { .. }) if range.reject() => self.begin(id, subread, *position, read),
            Err(error) => Err(error),
        }
    }

    /// Goes on with a subread whose fetch has ended with this result.
    ///
    /// # Errors
    ///
    /// The subread failed.
    pub fn fetch_ended(
        &mut self,
        id: SubreadId,
        result: Result<(), FetchError>,
        pending: &PendingSubread,
        fetching: &Fetching,
        read: &ActiveRead<'a>,
    ) -> Result<Step, Error> {
        let subread = &pending.subread;
        match self.delivery.locate(subread, read.subreads().lookup()) {
            Some(Located::Absent(range)) => {
                let again = self.fetches.retry(id, &range, fetching, result)?;
                Ok(Step::Pending(SubreadState::Fetching(again)))
            }
            located => {
                if let Some(Located::Present(range)) = located {
                    self.delivery.count_fetched(range.len());
                }
                self.begin(id, subread, pending.position, read)
            }
        }
    }

    /// Takes one queued subread for which there is room now.
    pub fn next_queued(&mut self) -> Option<SubreadId> {
        let from_storage = self.storage.next_queued();
        from_storage.or_else(|| self.fetches.next_queued())
    }

    /// Waits until a pending subread can go on, at most for `timeout`.
    ///
    /// # Errors
    ///
    /// The ring fails.
    pub fn wait(&mut self, timeout: Duration) -> io::Result<()> {
        if self.fetches.under_way() == 0 {
            // Storage answers; its reads are never given up.
            return self.storage.wait();
        }
        self.storage.submit()?;
        let timeout = match self.storage.is_backlogged() {
            true => timeout.min(Duration::from_millis(1)),
            false => timeout,
        };
        let fetches = self.fetches.descriptor();
        let ring = self.storage.ring().map(AsFd::as_fd);
        let mut polled = [
            PollFd::from_borrowed_fd(fetches, PollFlags::IN),
            PollFd::from_borrowed_fd(ring.unwrap_or(fetches), PollFlags::IN),
        ];
        match poll(&mut polled, Timespec::try_from(timeout).ok().as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}
