//! Freezes a writable layer, and refuses changes of a frozen or broken one.

use std::sync::RwLockReadGuard;
use std::sync::atomic::Ordering;

use super::super::Error;
use super::super::locks::Guard;
use super::WritableLayer;

impl WritableLayer {
    /// Waits for running changes, and blocks new ones while `commit` puts another layer above this one. If `commit`
    /// succeeds, this layer is read-only from then on.
    ///
    /// # Errors
    /// [`Error::Frozen`] if it is frozen already; those of `commit`, after which the layer is unchanged.
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

    /// Begins a change: the layer is not frozen until the guard is dropped.
    ///
    /// # Errors
    /// [`Error::Broken`], [`Error::Frozen`].
    pub(super) fn enter(&self) -> Result<Guard<RwLockReadGuard<'_, bool>>, Error> {
        self.check_not_broken()?;
        let frozen = self.gate.read();
        match *frozen {
            true => Err(Error::Frozen),
            false => Ok(frozen),
        }
    }

    /// Makes all later changes and flushes fail with [`Error::Broken`].
    pub(in super::super) fn mark_broken(&self) {
        self.broken.store(true, Ordering::Release);
    }

    /// Whether changes and flushes fail with [`Error::Broken`].
    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    /// Fails if the layer is broken.
    ///
    /// # Errors
    /// [`Error::Broken`].
    pub(in super::super) fn check_not_broken(&self) -> Result<(), Error> {
        match self.is_broken() {
            true => Err(Error::Broken {
                path: self.data.path().to_owned(),
            }),
            false => Ok(()),
        }
    }
}
