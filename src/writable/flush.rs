//! How changes of a writable layer are made to last, and how it is frozen.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{PoisonError, RwLockReadGuard};

use super::Error;
use super::extent_map::ExtentMap;
use super::index_file::IndexFile;
use super::layer::{Flusher, Rewrite, WritableLayer};
use super::reservation::Reservation;
use super::write::split;
use crate::format::lsmt::Mapping;

/// What one flush makes durable.
struct Round {
    batch: Vec<Mapping>,
    /// Number of the first mapping of the journal that is not part of it.
    next: u64,
    rewrite: Rewrite,
}

impl WritableLayer {
    /// Makes durable what was written before. Callers that come while one is at it share the next.
    ///
    /// # Errors
    /// Storage fails. If it lost data it had taken, the upper is broken for good.
    pub fn flush(&self) -> Result<(), Error> {
        let mine = self.asked.fetch_add(1, Ordering::AcqRel) + 1;
        let mut flusher = self.flusher();
        if flusher.done >= mine {
            return Ok(());
        }
        self.check().inspect_err(|_| self.discard_journal())?;
        let covered = self.asked.load(Ordering::Acquire);
        self.flush_all(&mut flusher)?;
        self.punch_free();
        flusher.done = covered;
        Ok(())
    }

    fn flush_all(&self, flusher: &mut Flusher) -> Result<(), Error> {
        self.check_len_apart()?;
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
        let is_cut = flusher.log.is_cut_short()?;
        let mut waiting = self.waiting();
        let pending = waiting.pending.len();
        let is_clean = !self.dirty.load(Ordering::Acquire) && !self.has_freed();
        if pending == 0 && is_clean && !is_cut && flusher.rewrite == Rewrite::No {
            return Ok(None);
        }
        let next = match pending {
            0 => waiting.journal.next(),
            _ => waiting.journal.begin_flush()?,
        };
        // Nothing enters the map as long as `waiting` is locked.
        let is_long = pending > 0
            && flusher.log.entries() >= flusher.retry_at
            && is_long(&flusher.log, &self.state().map, self.log_slack);
        let mut rewrite = match () {
            () if is_cut || self.is_full(flusher, pending) => Rewrite::Needed,
            () if is_long => flusher.rewrite.max(Rewrite::Wanted),
            () => flusher.rewrite,
        };
        if rewrite != Rewrite::No
            && let Err(error) = waiting.journal.begin_rewrite()
        {
            match rewrite {
                Rewrite::Needed => return Err(error),
                _ => rewrite = Rewrite::No,
            }
        }
        self.state_mut().space.begin_flush();
        Ok(Some(Round {
            batch: std::mem::take(&mut waiting.pending),
            next,
            rewrite,
        }))
    }

    /// Whether the index has no place for so many more entries.
    fn is_full(&self, flusher: &Flusher, more: usize) -> bool {
        flusher.log.entries() + more as u64 > self.max_log
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
                false => flusher.log.append(batch),
            };
        };
        let Err(error) = flusher.log.replace(&self.header, whole.into_iter()) else {
            return Ok(());
        };
        if round.rewrite == Rewrite::Wanted {
            // To be tried at every flush it is too much, and so is its log line.
            flusher.retry_at = flusher.log.entries().saturating_mul(2);
            ::log::warn!("the index stays as it is: {error}");
            return flusher.log.append(batch);
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
        self.state_mut().space.end_flush();
        let mut waiting = self.waiting();
        if round.rewrite != Rewrite::No {
            waiting.room = Reservation::new(&flusher.log, waiting.pending.len());
        }
        if round.batch.is_empty() && round.rewrite == Rewrite::No {
            return;
        }
        let entries = flusher.log.entries();
        if let Err(error) = waiting.journal.end_flush(round.next, entries) {
            ::log::debug!("the journal takes more space than it need: {error}");
        }
    }

    /// Lets the batch of a round wait again.
    fn take_back(&self, flusher: &Flusher, round: &mut Round) {
        let mut waiting = self.waiting();
        round.batch.append(&mut waiting.pending);
        std::mem::swap(&mut waiting.pending, &mut round.batch);
        // What was reserved may have been given up; the next write reserves it again.
        waiting.room = Reservation::new(&flusher.log, waiting.pending.len());
    }

    /// All mappings, copied a few at a time: with very many, who writes meanwhile must not wait for
    /// all of them.
    fn copy_map(&self) -> Vec<Mapping> {
        const EXTENTS: usize = 1024;
        let mut copied = Vec::new();
        let mut from = 0;
        loop {
            let state = self.state();
            let mut last = None;
            for extent in state.map.within(from..u64::MAX).take(EXTENTS) {
                copied.extend(split(extent));
                last = Some(extent.end());
            }
            match last {
                Some(end) => from = end,
                None => return copied,
            }
        }
    }

    fn sync_data(&self) -> Result<(), Error> {
        if !self.dirty.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        self.file.sync_data().map_err(|error| {
            self.break_down(&error);
            Error::file("sync", &self.paths.data)(error)
        })
    }

    /// The kernel lets go of pages that it could not store, and a later sync that succeeds says nothing
    /// about them. So nothing more is made durable, and the next process goes by the index alone, which
    /// points at nothing that may be lost.
    fn break_down(&self, error: &io::Error) {
        {
            let mut waiting = self.waiting();
            self.broken.store(true, Ordering::Release);
            waiting.journal_misleads = true;
        }
        ::log::error!(
            "{}: storage lost data ({error}): what was not flushed before is gone when the device \
             starts again, and no more is written until then",
            self.paths.data.display()
        );
        self.discard_journal();
    }

    /// Empties the journal if it points at data that may be lost. Where that fails, it is tried again
    /// at the next flush.
    fn discard_journal(&self) {
        let mut waiting = self.waiting();
        if waiting.journal_misleads {
            match waiting.journal.discard() {
                Ok(()) => waiting.journal_misleads = false,
                Err(error) => ::log::error!(
                    "{}: what was not flushed may come back damaged: {error}",
                    self.paths.data.display()
                ),
            }
        }
    }

    /// Waits for changes under way, and lets none begin while `commit` puts something in the
    /// layer's place. If that succeeds, the layer is only read from then on.
    pub(super) fn freeze<T>(&self, commit: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
        let mut frozen = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        if *frozen {
            return Err(Error::Frozen);
        }
        let committed = commit()?;
        *frozen = true;
        Ok(committed)
    }

    /// Takes no more changes, and makes nothing durable any more.
    pub(super) fn give_up(&self) {
        self.broken.store(true, Ordering::Release);
    }

    /// Begins a change, which keeps the layer from being frozen until it is over.
    pub(super) fn enter(&self) -> Result<RwLockReadGuard<'_, bool>, Error> {
        self.check()?;
        let frozen = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        match *frozen {
            true => Err(Error::Frozen),
            false => Ok(frozen),
        }
    }

    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    pub(super) fn check(&self) -> Result<(), Error> {
        match self.is_broken() {
            true => Err(Error::Broken {
                path: self.paths.data.clone(),
            }),
            false => Ok(()),
        }
    }
}

/// Whether a log would better be written anew: it has twice the entries that its map needs, and
/// `slack` more.
pub(super) fn is_long(log: &IndexFile, map: &ExtentMap, slack: u64) -> bool {
    log.entries() > 2 * map.mappings() + slack
}

/// The mappings of a whole map.
pub fn mappings(map: &ExtentMap) -> impl Iterator<Item = Mapping> + '_ {
    map.iter().flat_map(split)
}
