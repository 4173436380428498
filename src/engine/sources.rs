//! The ways to the bytes of a part, from the fastest to the slowest: memory, page cache, ring, and
//! for absent bytes the fetcher.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::BlockBackend;
use super::delivery::Delivery;
use super::fetches::Fetches;
use super::reading::{Budget, PendingPart, ReadId, Reading, Reads};
use super::ring::{Completion, MAX_READS, Ring, is_passing};
use crate::image::Error;
use crate::io::scatter::Cursor;
use crate::source::{Located, PresentRange};

/// Parts of one read that are pending at a time, so that a large one leaves room for others.
const MAX_PENDING: usize = 16;

/// What became of a part that was begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begun {
    /// Its bytes are in guest memory.
    Served,
    /// It is being read or fetched.
    Pending,
    /// There is no room for it.
    NoRoom(Budget),
}

/// A part that is no longer where it was: served, pending elsewhere, or failed.
pub type PartResult = (ReadId, Result<Begun, Error>);

/// A part that the ring reads.
#[derive(Debug)]
struct RingRead {
    pending: PendingPart,
    /// Bytes read so far.
    filled: usize,
}

/// What a worker reads with.
pub struct Sources<'a> {
    delivery: Delivery<'a>,
    /// Without one, the worker reads and waits.
    ring: Option<Ring>,
    /// The ring's reads, by the ring's id.
    ring_reads: Vec<Option<RingRead>>,
    fetches: Fetches,
    /// Parts that are pending, and wait for room to go on.
    deferred: VecDeque<PendingPart>,
}

impl<'a> Sources<'a> {
    /// Sources for `disk`, which wait for storage through `ring`.
    ///
    /// # Errors
    /// The process has no descriptor left.
    pub fn new(backend: &'a BlockBackend, ring: Option<Ring>) -> io::Result<Self> {
        Ok(Self {
            delivery: Delivery::new(backend),
            ring,
            ring_reads: (0..MAX_READS).map(|_| None).collect(),
            fetches: Fetches::new()?,
            deferred: VecDeque::new(),
        })
    }

    /// The means to deliver bytes.
    pub fn delivery(&self) -> &Delivery<'a> {
        &self.delivery
    }

    /// The ring.
    pub fn ring(&self) -> Option<&Ring> {
        self.ring.as_ref()
    }

    /// The fetches.
    pub fn fetches(&self) -> &Fetches {
        &self.fetches
    }

    /// Serves or begins all parts that `reading`, named `id`, has left; returns what the next part
    /// waits for, if one is left.
    ///
    /// # Errors
    /// A part failed.
    #[inline]
    pub fn serve(
        &mut self,
        id: ReadId,
        reading: &mut Reading<'a>,
    ) -> Result<Option<Budget>, Error> {
        while let Some((part, position)) = reading.split().1.peek() {
            let pending = PendingPart {
                read: id,
                part,
                position,
            };
            match self.begin(&pending, reading, reading.pending() < MAX_PENDING)? {
                Begun::NoRoom(room) => return Ok(Some(room)),
                Begun::Pending => reading.part_begun(),
                Begun::Served => {}
            }
            reading.split().1.take(&part);
        }
        Ok(None)
    }

    /// Serves or begins one part, which is only begun if it `may_wait`.
    #[inline]
    fn begin(
        &mut self,
        pending: &PendingPart,
        reading: &Reading<'a>,
        may_wait: bool,
    ) -> Result<Begun, Error> {
        let part = &pending.part;
        loop {
            let mut cursor = reading
                .request()
                .chain()
                .writable()
                .cursor(pending.position);
            let range = match self.delivery.locate(part, reading.plan().lookup()) {
                Some(Located::Present(range)) => range,
                Some(Located::Absent(_)) if !may_wait => return Ok(Begun::NoRoom(Budget::Own)),
                Some(Located::Absent(range)) => {
                    return Ok(match self.fetches.begin(&range, *pending) {
                        true => Begun::Pending,
                        false => Begun::NoRoom(Budget::Fetch),
                    });
                }
                None => {
                    cursor.zero(part.len() as usize);
                    return Ok(Begun::Served);
                }
            };
            let begun = match self.delivery.from_memory(part, range, cursor) {
                Ok(true) => return Ok(Begun::Served),
                Ok(false) if !may_wait => return Ok(Begun::NoRoom(Budget::Own)),
                Ok(false) => self.begin_read(pending, range, cursor),
                Err(error) => Err(error),
            };
            match begun {
                // It is absent from now on: the next round fetches it again.
                Err(error) if is_rejected(&error, range) => {}
                begun => return begun,
            }
        }
    }

    /// Reads a part if that needs no waiting, or begins to read it by the ring. Without a ring, it
    /// waits.
    fn begin_read(
        &mut self,
        pending: &PendingPart,
        range: PresentRange<'_>,
        cursor: Cursor<'_, '_>,
    ) -> Result<Begun, Error> {
        let part = &pending.part;
        let Some(ring) = &mut self.ring else {
            self.delivery.from_storage(part, range, cursor)?;
            return Ok(Begun::Served);
        };
        if self.delivery.from_page_cache(part, range, cursor)? {
            return Ok(Begun::Served);
        }
        let Some(id) = ring.free_id() else {
            return Ok(Begun::NoRoom(Budget::Ring));
        };
        let buffer = ring.buffer(range.len());
        ring.read(id, range.descriptor(), range.offset(), buffer, 0)
            .map_err(|error| range.failed(error))?;
        self.ring_reads[id] = Some(RingRead {
            pending: *pending,
            filled: 0,
        });
        Ok(Begun::Pending)
    }

    /// Goes on with a part that is pending, from wherever its bytes are now.
    fn go_on(&mut self, pending: PendingPart, reading: &Reading<'a>) -> PartResult {
        let begun = self.begin(&pending, reading, true);
        if let Ok(Begun::NoRoom(_)) = begun {
            self.deferred.push_back(pending);
            return (pending.read, Ok(Begun::Pending));
        }
        (pending.read, begun)
    }

    /// Goes on with one part that waited for room, if there is room now.
    pub fn deferred(&mut self, reads: &mut Reads<'a>) -> Option<PartResult> {
        let pending = self.deferred.pop_front()?;
        let reading = reads.get_mut(pending.read)?;
        match self.begin(&pending, reading, true) {
            Ok(Begun::NoRoom(_)) => {
                self.deferred.push_front(pending);
                None
            }
            begun => Some((pending.read, begun)),
        }
    }

    /// Takes one read that the ring has finished.
    pub fn ring_completed(&mut self, reads: &mut Reads<'a>) -> Option<PartResult> {
        loop {
            let ring = self.ring.as_mut()?;
            let completion = ring.completed()?;
            let read = self.ring_reads.get_mut(completion.id);
            if let Some(read) = read.and_then(Option::take)
                && let Some(reading) = reads.get_mut(read.pending.read)
                && let Some(result) = self.ring_read(completion, read, reading)
            {
                return Some(result);
            }
        }
    }

    /// Delivers what the ring has read; `None` if that came short and the rest is being read.
    fn ring_read(
        &mut self,
        completion: Completion,
        mut read: RingRead,
        reading: &Reading<'a>,
    ) -> Option<PartResult> {
        let Completion { id, result, buffer } = completion;
        let pending = read.pending;
        let located = self.delivery.locate(&pending.part, reading.plan().lookup());
        let Some(Located::Present(range)) = located else {
            // Another queue found the bytes damaged meanwhile.
            return Some(self.go_on(pending, reading));
        };
        let failed = |error: crate::source::Error| Some((pending.read, Err(error.into())));
        match result {
            Ok(0) => return failed(range.short(read.filled)),
            Ok(count) => read.filled += count,
            Err(error) if is_passing(&error) => {}
            Err(error) => return failed(range.failed(error)),
        }
        let ring = self.ring.as_mut()?;
        if read.filled < range.len() {
            let (at, filled) = (range.offset() + read.filled as u64, read.filled);
            if let Err(error) = ring.read(id, range.descriptor(), at, buffer, filled) {
                return failed(range.failed(error));
            }
            self.ring_reads[id] = Some(read);
            return None;
        }
        let cursor = reading
            .request()
            .chain()
            .writable()
            .cursor(pending.position);
        let delivered = self
            .delivery
            .from_bytes(&pending.part, range, &buffer, cursor);
        ring.recycle(buffer);
        match delivered {
            Ok(()) => Some((pending.read, Ok(Begun::Served))),
            Err(error) if is_rejected(&error, range) => Some(self.go_on(pending, reading)),
            Err(error) => Some((pending.read, Err(error))),
        }
    }

    /// Takes one fetch that has ended, and goes on with its part.
    pub fn fetch_ended(&mut self, reads: &mut Reads<'a>) -> Option<PartResult> {
        loop {
            let ended = self.fetches.ended()?;
            let pending = ended.pending;
            let Some(reading) = reads.get_mut(pending.read) else {
                continue;
            };
            let located = self.delivery.locate(&pending.part, reading.plan().lookup());
            return Some(match located {
                Some(Located::Absent(range)) => {
                    let again = self.fetches.again(&range, ended);
                    (pending.read, again.map(|()| Begun::Pending))
                }
                _ => self.go_on(pending, reading),
            });
        }
    }

    /// Gives up one part that is being fetched, or waits for room.
    pub fn give_up(&mut self) -> Option<PendingPart> {
        self.fetches.give_up().or_else(|| self.deferred.pop_front())
    }

    /// Goes on without the ring, which failed. Its parts wait for [`Sources::deferred`].
    pub fn drop_ring(&mut self) {
        if let Some(ring) = self.ring.take() {
            ring.abandon();
        }
        let reads = self.ring_reads.iter_mut().filter_map(Option::take);
        self.deferred.extend(reads.map(|read| read.pending));
    }

    /// Whether one more part can be begun.
    pub fn has_room(&self, room: Budget) -> bool {
        match room {
            Budget::Own => true,
            Budget::Ring => {
                let ring = self.ring.as_ref();
                ring.is_none_or(|ring| ring.free_id().is_some())
            }
            Budget::Fetch => self.fetches.has_room(),
        }
    }

    /// Whether parts are pending.
    pub fn is_waiting(&self) -> bool {
        let ring = self.ring.as_ref();
        ring.is_some_and(|ring| ring.under_way() > 0)
            || self.fetches.count() > 0
            || !self.deferred.is_empty()
    }

    /// Whether reads are prepared that could not be started yet.
    pub fn is_backlogged(&mut self) -> bool {
        self.ring.as_mut().is_some_and(Ring::is_backlogged)
    }

    /// Starts the reads that are prepared.
    ///
    /// # Errors
    /// The ring fails.
    pub fn submit(&mut self) -> io::Result<()> {
        self.ring.as_mut().map_or(Ok(()), Ring::submit)
    }

    /// Waits until a part can go on, at most for `timeout`.
    ///
    /// # Errors
    /// The ring fails.
    pub fn wait(&mut self, timeout: Duration) -> io::Result<()> {
        if self.fetches.count() == 0 {
            // Storage answers; its reads are never given up.
            return self.ring.as_mut().map_or(Ok(()), Ring::wait);
        }
        self.submit()?;
        let timeout = match self.is_backlogged() {
            true => timeout.min(Duration::from_millis(1)),
            false => timeout,
        };
        let fetches = self.fetches.descriptor();
        let ring = self.ring.as_ref().map(AsFd::as_fd);
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

/// Whether `error` says that the bytes of `range` are damaged, and they will be fetched again.
#[cold]
fn is_rejected(error: &Error, range: PresentRange<'_>) -> bool {
    matches!(error, Error::Block { .. }) && range.blob().reject(range.offset(), range.len())
}
