//! How changes of a writable layer are made to last, and how it is frozen.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{PoisonError, RwLockReadGuard};

use super::Error;
use super::extent_map::ExtentMap;
use super::index_file::IndexFile;
use super::layer::{Flusher, WritableLayer};
use super::reservation::Reservation;
use super::write::split;
use crate::format::lsmt::Mapping;

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
        self.check()?;
        let covered = self.asked.load(Ordering::Acquire);
        self.flush_all(&mut flusher)?;
        flusher.done = covered;
        Ok(())
    }

    fn flush_all(&self, flusher: &mut Flusher) -> Result<(), Error> {
        self.check_len_apart()?;
        let is_cut = flusher.log.is_cut_short()?;
        let entries = flusher.log.entries();
        let is_full = |more: usize| entries + more as u64 > self.max_log;
        let (batch, anew) = {
            let mut waiting = self.waiting();
            let pending = waiting.pending.len();
            if pending > 0 {
                waiting.journal.switch()?;
            } else if !self.dirty.load(Ordering::Acquire) && !is_cut && !self.has_freed() {
                return Ok(());
            }
            // Nothing enters the map as long as `waiting` is locked.
            let is_long = pending > 0
                && flusher.log.entries() >= flusher.retry_at
                && is_long(&flusher.log, &self.state().map, self.log_slack);
            let anew = is_cut || is_full(pending) || is_long;
            if anew {
                // It may have any number of entries.
                waiting.journal.set_entries(u64::MAX)?;
            }
            self.state_mut().space.begin_flush();
            (std::mem::take(&mut waiting.pending), anew)
        };
        // What enters the map meanwhile may be part of it: the next flush enters it again.
        let whole = anew.then(|| self.copy_map());
        let made = self.sync_data().and_then(|()| match whole {
            None if batch.is_empty() => Ok(()),
            None => flusher.log.append(&batch),
            Some(whole) => {
                let replaced = flusher.log.replace(&self.header, whole.into_iter());
                replaced.or_else(|error| {
                    if is_cut {
                        return Err(error);
                    }
                    if is_full(batch.len()) {
                        return Err(Error::IndexFull {
                            path: self.paths.index.clone(),
                            most: self.max_log,
                            source: error.into(),
                        });
                    }
                    // To be tried at every flush it is too much, and so is its log line.
                    flusher.retry_at = flusher.log.entries().saturating_mul(2);
                    ::log::warn!("the index stays long: {error}");
                    flusher.log.append(&batch)
                })
            }
        });
        if let Err(error) = made {
            let mut waiting = self.waiting();
            let later = std::mem::replace(&mut waiting.pending, batch);
            waiting.pending.extend(later);
            // What was taken may have been given back; whoever writes next takes it again.
            waiting.room = Reservation::new(&flusher.log, waiting.pending.len());
            return Err(error);
        }
        self.state_mut().space.end_flush();
        let mut waiting = self.waiting();
        if anew {
            waiting.room = Reservation::new(&flusher.log, waiting.pending.len());
        }
        match batch.is_empty() && !anew {
            true => Ok(()),
            false => waiting.journal.settle(flusher.log.entries()),
        }
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

    /// The system forgets what it could not write: a later sync that succeeds says nothing about
    /// it. Who opens the layer next goes by the index alone, which points at nothing that may be
    /// lost.
    fn break_down(&self, error: &io::Error) {
        let waiting = self.waiting();
        self.broken.store(true, Ordering::Release);
        let path = self.paths.data.display();
        ::log::error!(
            "{path}: storage lost data ({error}): what was not flushed before is gone when the \
             device starts again, and no more is written until then"
        );
        if let Err(error) = waiting.journal.discard() {
            ::log::error!("{path}: what was not flushed may come back damaged: {error}");
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

    pub(super) fn check(&self) -> Result<(), Error> {
        match self.broken.load(Ordering::Acquire) {
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
