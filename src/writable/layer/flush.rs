//! Flushing a writable layer, and freezing it.

use std::io;
use std::sync::RwLockReadGuard;
use std::sync::atomic::Ordering;

use super::super::Error;
use super::super::extent_map::ExtentMap;
use super::super::index_file::IndexFile;
use super::super::locks::Guard;
use super::super::reservation::Reservation;
use super::{Flusher, Rewrite, WritableLayer};
use crate::format::lsmt::Mapping;

/// What one flush makes durable.
struct Round {
    batch: Vec<Mapping>,
    /// Number of the first mapping of the journal that is not part of it.
    next: u64,
    rewrite: Rewrite,
}

impl WritableLayer {
    /// Makes durable what was written before. Callers that come during a flush share the next one.
    ///
    /// # Errors
    /// [`Error::File`] or [`Error::Bytes`] if storage fails. If it lost data it had taken, this and all
    /// later flushes and writes fail: [`Error::Broken`].
    pub fn flush(&self) -> Result<(), Error> {
        let mine = self.tickets.fetch_add(1, Ordering::AcqRel) + 1;
        let mut flusher = self.flush.lock();
        if flusher.done >= mine {
            return Ok(());
        }
        self.check().inspect_err(|_| self.discard_journal())?;
        let covered = self.tickets.load(Ordering::Acquire);
        self.flush_all(&mut flusher)?;
        self.punch_free();
        flusher.done = covered;
        Ok(())
    }

    fn flush_all(&self, flusher: &mut Flusher) -> Result<(), Error> {
        self.data.check_len_apart()?;
        let Some(mut round) = self.begin_round(flusher)? else {
            return Ok(());
        };
        // What enters the map meanwhile may be part of it: the next flush enters it again.
        let whole = (round.rewrite != Rewrite::No).then(|| self.copy_map());
        let made = self
            .sync_data()
            .and_then(|()| self.write_index(flusher, &round, whole));
        match made {
            Ok(()) => self.end_round(flusher, &round),
            Err(_) => self.take_back(flusher, &mut round),
        }
        made
    }

    /// Takes what waits, and lets the journal go on without it. `None`: there is nothing to do.
    fn begin_round(&self, flusher: &Flusher) -> Result<Option<Round>, Error> {
        let is_cut = flusher.index.is_cut_short()?;
        let mut pending = self.pending.lock();
        let count = pending.mappings.len();
        let is_clean = !self.data.is_dirty() && !self.has_freed();
        if count == 0 && is_clean && !is_cut && flusher.rewrite == Rewrite::No {
            return Ok(None);
        }
        let next = match count {
            0 => pending.journal.next(),
            _ => pending.journal.begin_flush()?,
        };
        // Nothing enters the map while `pending` is locked.
        let is_long = count > 0
            && flusher.index.entries() >= flusher.retry_at
            && is_long(&flusher.index, &self.placement.read().map, self.log_slack);
        let mut rewrite = match () {
            () if is_cut || self.is_full(flusher, count) => Rewrite::Needed,
            () if is_long => flusher.rewrite.max(Rewrite::Wanted),
            () => flusher.rewrite,
        };
        if rewrite != Rewrite::No
            && let Err(error) = pending.journal.begin_rewrite()
        {
            match rewrite {
                Rewrite::Needed => return Err(error),
                _ => rewrite = Rewrite::No,
            }
        }
        self.placement.write().space.begin_flush();
        Ok(Some(Round {
            batch: std::mem::take(&mut pending.mappings),
            next,
            rewrite,
        }))
    }

    /// Whether the index has no place for so many more entries.
    fn is_full(&self, flusher: &Flusher, more: usize) -> bool {
        flusher.index.entries() + more as u64 > self.max_log
    }

    /// Enters the batch of a round in the index, or writes the index anew, durably.
    fn write_index(
        &self,
        flusher: &mut Flusher,
        round: &Round,
        whole: Option<Vec<Mapping>>,
    ) -> Result<(), Error> {
        let batch = &round.batch;
        let Some(whole) = whole else {
            return match batch.is_empty() {
                true => Ok(()),
                false => flusher.index.append(batch),
            };
        };
        let Err(error) = flusher.index.replace(&self.header, whole.into_iter()) else {
            return Ok(());
        };
        if round.rewrite == Rewrite::Wanted {
            // To be tried at every flush it is too much, and so is its log line.
            flusher.retry_at = flusher.index.entries().saturating_mul(2);
            ::log::warn!("cannot rewrite the index: {error}");
            return flusher.index.append(batch);
        }
        match self.is_full(flusher, batch.len()) {
            true => Err(Error::IndexFull {
                path: self.paths.index.clone(),
                most: self.max_log,
                source: error.into(),
            }),
            false => Err(error),
        }
    }

    /// Notes that the batch of a round is durable.
    fn end_round(&self, flusher: &mut Flusher, round: &Round) {
        flusher.rewrite = Rewrite::No;
        self.placement.write().space.end_flush();
        let mut pending = self.pending.lock();
        if round.rewrite != Rewrite::No {
            pending.reservation = Reservation::new(&flusher.index, pending.mappings.len());
        }
        if round.batch.is_empty() && round.rewrite == Rewrite::No {
            return;
        }
        let entries = flusher.index.entries();
        if let Err(error) = pending.journal.end_flush(round.next, entries) {
            ::log::debug!("cannot empty the journal: {error}");
        }
    }

    /// Lets the batch of a round wait again.
    fn take_back(&self, flusher: &Flusher, round: &mut Round) {
        let mut pending = self.pending.lock();
        round.batch.append(&mut pending.mappings);
        std::mem::swap(&mut pending.mappings, &mut round.batch);
        // What was reserved may have been given up; the next write reserves it again.
        pending.reservation = Reservation::new(&flusher.index, pending.mappings.len());
    }

    /// All mappings, copied a few at a time, so that writes do not wait for all of them.
    fn copy_map(&self) -> Vec<Mapping> {
        const EXTENTS: usize = 1024;
        let mut copied = Vec::new();
        let mut from = 0;
        loop {
            let placement = self.placement.read();
            let mut last = None;
            for extent in placement.map.within(from..u64::MAX).take(EXTENTS) {
                copied.extend(extent.mappings());
                last = Some(extent.end());
            }
            match last {
                Some(end) => from = end,
                None => return copied,
            }
        }
    }

    fn sync_data(&self) -> Result<(), Error> {
        self.data.sync().map_err(|error| {
            self.break_down(&error);
            Error::file("sync", self.data.path())(error)
        })
    }

    /// The kernel lets go of pages that it could not store, and a later sync that succeeds says nothing
    /// about them. So nothing more is made durable, and the next process goes by the index alone, which
    /// points at nothing that may be lost.
    fn break_down(&self, error: &io::Error) {
        {
            let mut pending = self.pending.lock();
            self.broken.store(true, Ordering::Release);
            pending.journal_misleads = true;
        }
        ::log::error!(
            "{}: sync failed ({error}): writes are refused until the daemon restarts, and writes \
             since the last successful flush may be lost",
            self.data.path().display()
        );
        self.discard_journal();
    }

    /// Empties the journal if it points at data that may be lost. Where that fails, it is tried again
    /// at the next flush.
    fn discard_journal(&self) {
        let mut pending = self.pending.lock();
        if pending.journal_misleads {
            match pending.journal.discard() {
                Ok(()) => pending.journal_misleads = false,
                Err(error) => ::log::error!(
                    "{}: cannot empty the journal after a failed sync; unflushed data may be wrong: {error}",
                    self.data.path().display()
                ),
            }
        }
    }

    /// Waits for changes under way, and lets none begin while `commit` puts another layer above this one.
    /// If that succeeds, this layer is read-only from then on.
    pub(in super::super) fn freeze<T>(
        &self,
        commit: impl FnOnce() -> Result<T, Error>,
    ) -> Result<T, Error> {
        let mut frozen = self.gate.write();
        if *frozen {
            return Err(Error::Frozen);
        }
        let committed = commit()?;
        *frozen = true;
        Ok(committed)
    }

    /// Refuses all later changes and flushes.
    pub(in super::super) fn give_up(&self) {
        self.broken.store(true, Ordering::Release);
    }

    /// Begins a change, which keeps the layer from being frozen until it is over.
    pub(super) fn enter(&self) -> Result<Guard<RwLockReadGuard<'_, bool>>, Error> {
        self.check()?;
        let frozen = self.gate.read();
        match *frozen {
            true => Err(Error::Frozen),
            false => Ok(frozen),
        }
    }

    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    pub(in super::super) fn check(&self) -> Result<(), Error> {
        match self.is_broken() {
            true => Err(Error::Broken {
                path: self.data.path().to_owned(),
            }),
            false => Ok(()),
        }
    }
}

/// Whether an index should be written anew: it has twice the entries that its map needs, and `slack`
/// more.
pub(super) fn is_long(index: &IndexFile, map: &ExtentMap, slack: u64) -> bool {
    index.entries() > 2 * map.mappings() + slack
}
