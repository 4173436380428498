//! Flushes a writable layer: makes its data durable, then the mappings of that data.

use std::io;
use std::sync::atomic::Ordering;

use super::super::Error;
use super::super::extent_map::ExtentMap;
use super::super::index_file::IndexFile;
use super::super::reservation::Reservation;
use super::{Flusher, Rewrite, WritableLayer};
use crate::format::lsmt::{MAX_SECTORS, Mapping};
use crate::ratelimited_log;
use crate::units::{Sector, SectorRange};

/// What one flush makes durable.
struct Round {
    batch: Vec<Mapping>,
    /// Number of the first mapping of the journal that is not in the batch.
    next: u64,
    rewrite: Rewrite,
}

impl WritableLayer {
    /// Makes all earlier writes durable. Callers that arrive during a flush share the next one.
    ///
    /// # Errors
    /// [`Error::File`] or [`Error::Bytes`] if the storage fails. If it lost data that it had accepted, this flush fails with
    /// [`Error::DataLost`], and all later flushes and writes with [`Error::Broken`].
    pub fn flush(&self) -> Result<(), Error> {
        let mine = self.tickets.fetch_add(1, Ordering::AcqRel) + 1;
        let mut flusher = self.flush.lock();
        if flusher.done >= mine {
            return Ok(());
        }
        self.check_not_broken()
            .inspect_err(|_| self.invalidate_journal())?;
        let covered = self.tickets.load(Ordering::Acquire);
        self.flush_all(&mut flusher)?;
        self.punch_free();
        flusher.done = covered;
        Ok(())
    }

    /// Returns whether the next flush may free storage.
    pub(in super::super) fn frees_by_flush(&self) -> bool {
        self.placement.read().allocator.has_freed()
    }

    fn flush_all(&self, flusher: &mut Flusher) -> Result<(), Error> {
        self.data.check_len_during_sync()?;
        let Some(mut round) = self.begin_round(flusher)? else {
            return Ok(());
        };
        // Mappings that arrive meanwhile may be included; the next flush enters them again.
        let whole = (round.rewrite != Rewrite::No).then(|| self.copy_map());
        let flushed = self
            .sync_data()
            .and_then(|()| self.write_index(flusher, &round, whole));
        match flushed {
            Ok(()) => self.end_round(flusher, &round),
            Err(_) => self.take_back(flusher, &mut round),
        }
        flushed
    }

    /// Takes the waiting mappings as the batch of a round. `None`: there is nothing to flush.
    fn begin_round(&self, flusher: &Flusher) -> Result<Option<Round>, Error> {
        let is_cut = flusher.index.is_cut_short()?;
        let mut pending = self.pending.lock();
        let count = pending.mappings.len();
        let is_clean = !self.data.is_dirty() && !self.placement.read().allocator.has_freed();
        if count == 0 && is_clean && !is_cut && flusher.rewrite == Rewrite::No {
            return Ok(None);
        }
        let next = match count {
            0 => pending.journal.next(),
            _ => pending.journal.begin_flush()?,
        };
        let mut rewrite = self.choose_rewrite(flusher, count, is_cut);
        if rewrite != Rewrite::No
            && let Err(error) = pending.journal.begin_rewrite()
        {
            match rewrite {
                Rewrite::Needed => return Err(error),
                _ => rewrite = Rewrite::No,
            }
        }
        self.placement.write().allocator.begin_flush();
        Ok(Some(Round {
            batch: std::mem::take(&mut pending.mappings),
            next,
            rewrite,
        }))
    }

    /// Whether to rewrite the index in a round of `count` mappings. The caller holds the lock of the pending
    /// mappings, so that the map does not change.
    fn choose_rewrite(&self, flusher: &Flusher, count: usize, is_cut: bool) -> Rewrite {
        if is_cut || self.is_full(flusher, count) {
            return Rewrite::Needed;
        }
        let is_long = count > 0
            && flusher.index.entries() >= flusher.retry_at
            && is_long(
                &flusher.index,
                &self.placement.read().map,
                self.bounds.index_slack,
            );
        match is_long {
            true => flusher.rewrite.max(Rewrite::Wanted),
            false => flusher.rewrite,
        }
    }

    /// Whether the index has no room for `more` entries.
    fn is_full(&self, flusher: &Flusher, more: usize) -> bool {
        flusher.index.entries() + more as u64 > self.bounds.max_index_entries
    }

    /// Appends the batch of a round to the index, or rewrites the index from `whole`. Durable afterwards.
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
        let Err(error) = flusher.index.replace(&self.header(), whole.into_iter()) else {
            return Ok(());
        };
        if round.rewrite == Rewrite::Wanted {
            // Not at every flush: an attempt is expensive, and logs a line.
            flusher.retry_at = flusher.index.entries().saturating_mul(2);
            ratelimited_log::warn(format_args!("cannot rewrite the index: {error}"));
            return flusher.index.append(batch);
        }
        match self.is_full(flusher, batch.len()) {
            true => Err(Error::IndexFull {
                path: self.paths.index.clone(),
                most: self.bounds.max_index_entries,
                source: error.into(),
            }),
            false => Err(error),
        }
    }

    /// Ends a round whose batch is durable.
    fn end_round(&self, flusher: &mut Flusher, round: &Round) {
        flusher.rewrite = Rewrite::No;
        self.placement.write().allocator.end_flush();
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

    /// Puts the batch of a failed round back before the mappings that arrived meanwhile.
    fn take_back(&self, flusher: &Flusher, round: &mut Round) {
        let mut pending = self.pending.lock();
        round.batch.append(&mut pending.mappings);
        std::mem::swap(&mut pending.mappings, &mut round.batch);
        // The round may have released the reserved space; the next write reserves it again.
        pending.reservation = Reservation::new(&flusher.index, pending.mappings.len());
    }

    /// All mappings, copied a few at a time, so that writes wait for a few only.
    fn copy_map(&self) -> Vec<Mapping> {
        const EXTENTS: usize = 1024;
        let mut copied = Vec::new();
        let mut rest = SectorRange::new(Sector(0), Sector(0) + MAX_SECTORS);
        loop {
            let placement = self.placement.read();
            let mut last = None;
            for extent in placement.map.within(rest).take(EXTENTS) {
                copied.extend(extent.mappings());
                last = Some(extent.end());
            }
            match last {
                Some(end) => rest = SectorRange::new(end, rest.end()),
                None => return copied,
            }
        }
    }

    pub(super) fn sync_data(&self) -> Result<(), Error> {
        self.data.sync().map_err(|error| {
            self.break_down(&error);
            Error::DataLost {
                path: self.data.path().to_owned(),
                source: error,
            }
        })
    }

    /// Handles a failed sync. The kernel drops pages that it could not store, and a later sync that succeeds does
    /// not report them. So nothing more is made durable, and the next process goes by the index alone, which points
    /// at no data that may be lost.
    fn break_down(&self, error: &io::Error) {
        {
            let mut pending = self.pending.lock();
            self.mark_broken();
            pending.journal_misleads = true;
        }
        ratelimited_log::error(format_args!(
            "{}: sync failed ({error}): writes are refused until the daemon restarts, and writes \
             since the last successful flush may be lost",
            self.data.path().display()
        ));
        self.invalidate_journal();
    }

    /// Empties the journal if it points at data that may be lost. If that fails, the next flush tries again.
    fn invalidate_journal(&self) {
        let mut pending = self.pending.lock();
        if !pending.journal_misleads {
            return;
        }
        match pending.journal.invalidate() {
            Ok(()) => pending.journal_misleads = false,
            Err(error) => ratelimited_log::error(format_args!(
                "{}: cannot empty the journal after a failed sync; unflushed data may be wrong: {error}",
                self.data.path().display()
            )),
        }
    }
}

/// Whether an index should be rewritten: it has twice the entries that its map needs, and `slack` more.
pub(super) fn is_long(index: &IndexFile, map: &ExtentMap, slack: u64) -> bool {
    index.entries() > 2 * map.mappings() + slack
}
