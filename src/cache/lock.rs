//! The lock of a cache directory, held while names in it change.

use std::fs::{File, TryLockError};
use std::time::Duration;

use super::layout::Layout;
use super::{Cache, Error};
use crate::io::file_lock::{LockKind, lock_within};
use crate::io::regular::open_regular;

/// How long to wait for the lock. A process holds it while it renames files, never while it waits for a
/// network.
const PATIENCE: Duration = Duration::from_secs(30);

/// The lock, until dropped.
#[derive(Debug)]
pub(super) struct Lock {
    _file: File,
}

impl Cache {
    pub(super) fn lock(&self) -> Result<Lock, Error> {
        lock(&self.layout)
    }
}

/// Takes the lock of a cache directory.
pub(super) fn lock(layout: &Layout) -> Result<Lock, Error> {
    let path = layout.lock();
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    let file = open_regular(&path, options).map_err(Error::file("open", &path))?;
    match lock_within(&file, LockKind::Exclusive, PATIENCE) {
        Ok(()) => Ok(Lock { _file: file }),
        Err(TryLockError::Error(error)) => Err(Error::file("lock", &path)(error)),
        Err(TryLockError::WouldBlock) => {
            let seconds = PATIENCE.as_secs();
            Err(Error::Locked { path, seconds })
        }
    }
}
