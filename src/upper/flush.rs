//! How changes of a writable layer are made to last, and how it is frozen.

use std::sync::atomic::Ordering;
use std::sync::{PoisonError, RwLockReadGuard};

use super::Error;
use super::change::split;
use super::log::Log;
use super::map::ExtentMap;
use super::writer::{Flusher, Upper};
use crate::format::lsmt::Mapping;

/// A log is written anew when it has twice the entries that its map needs, and this many more.
const LOG_SLACK: u64 = 1 << 16;

impl Upper {
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
        let (batch, whole) = {
            let mut state = self.state_mut();
            if !state.pending.is_empty() {
                state.journal.switch()?;
            }
            state.space.begin_flush();
            let whole = is_long(&flusher.log, &state.map).then(|| state.map.clone());
            (std::mem::take(&mut state.pending), whole)
        };
        let made = self.sync_data().and_then(|()| match whole {
            _ if batch.is_empty() => Ok(()),
            None => flusher.log.append(&batch),
            Some(map) => {
                let replaced = flusher.log.replace(&self.header, mappings(&map));
                replaced.or_else(|error| {
                    ::log::warn!("the index stays long: {error}");
                    flusher.log.append(&batch)
                })
            }
        });
        let mut state = self.state_mut();
        if let Err(error) = made {
            let later = std::mem::replace(&mut state.pending, batch);
            state.pending.extend(later);
            return Err(error);
        }
        state.space.end_flush();
        match batch.is_empty() {
            true => Ok(()),
            false => state.journal.settle(),
        }
    }

    fn sync_data(&self) -> Result<(), Error> {
        if !self.dirty.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        self.file.sync_data().map_err(|error| {
            // The system forgets what it could not write: a later sync that succeeds says nothing
            // about it.
            self.broken.store(true, Ordering::Release);
            Error::file("sync", &self.paths.data)(error)
        })
    }

    /// Waits for changes under way, and lets none begin while `commit` puts something in the
    /// layer's place. If that succeeds, the layer is only read from then on.
    pub(super) fn freeze(&self, commit: impl FnOnce() -> Result<(), Error>) -> Result<(), Error> {
        let mut frozen = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        if *frozen {
            return Err(Error::Frozen);
        }
        commit()?;
        *frozen = true;
        Ok(())
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

    fn check(&self) -> Result<(), Error> {
        match self.broken.load(Ordering::Acquire) {
            true => Err(Error::Broken {
                path: self.paths.data.clone(),
            }),
            false => Ok(()),
        }
    }
}

/// Whether a log would better be written anew.
pub(super) fn is_long(log: &Log, map: &ExtentMap) -> bool {
    log.entries() > 2 * map.len() as u64 + LOG_SLACK
}

/// The mappings of a whole map.
pub(super) fn mappings(map: &ExtentMap) -> impl Iterator<Item = Mapping> + '_ {
    map.iter().flat_map(split)
}
