//! Locks on the file of a blob, by which layers that another process writes are recognized.

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::{Blob, Error};

impl Blob {
    /// Takes a shared lock on the file. Returns false if another process holds an exclusive lock. Never
    /// waits.
    ///
    /// # Errors
    /// [`Error::Lock`] if the file system has no locks.
    pub fn try_lock_shared(&self) -> Result<bool, Error> {
        match flock(self.file(), FlockOperation::NonBlockingLockShared) {
            Ok(()) => Ok(true),
            Err(Errno::WOULDBLOCK | Errno::INTR) => Ok(false),
            Err(errno) => Err(self.unlockable(errno)),
        }
    }

    /// Releases the lock.
    ///
    /// # Errors
    /// [`Error::Lock`] if `flock(2)` fails.
    pub fn unlock(&self) -> Result<(), Error> {
        flock(self.file(), FlockOperation::Unlock).map_err(|errno| self.unlockable(errno))
    }

    fn unlockable(&self, errno: Errno) -> Error {
        Error::Lock {
            layer: self.layer().clone(),
            source: errno.into(),
        }
    }
}
