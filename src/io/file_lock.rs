//! Locks of files and directories (`flock(2)`), waited for with a deadline.

use std::fs::{File, TryLockError};
use std::io;
use std::thread;
use std::time::{Duration, Instant};

/// Pause between two attempts: the kernel has no lock with a timeout.
const PAUSE: Duration = Duration::from_millis(2);

/// Which other locks a lock excludes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockKind {
    /// Exclusive ones.
    Shared,
    /// All.
    Exclusive,
}

/// Locks `file` until it is closed or unlocked. While another process holds a lock that excludes this one, tries again
/// until `limit` has passed; at least once.
///
/// # Errors
/// [`TryLockError::WouldBlock`] if the file is still locked after `limit`; [`TryLockError::Error`] if the file cannot
/// be locked at all.
pub fn lock_within(file: &File, kind: LockKind, limit: Duration) -> Result<(), TryLockError> {
    let start = Instant::now();
    loop {
        let locked = match kind {
            LockKind::Shared => file.try_lock_shared(),
            LockKind::Exclusive => file.try_lock(),
        };
        match locked {
            Err(TryLockError::WouldBlock) if start.elapsed() < limit => thread::sleep(PAUSE),
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            locked => return locked,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Long enough for any machine: it turns a hang into a failure.
    const LONG: Duration = Duration::from_secs(60);

    fn open_twice() -> (File, File) {
        let file = tempfile::NamedTempFile::new().unwrap();
        (file.reopen().unwrap(), file.reopen().unwrap())
    }

    #[test]
    fn a_lock_that_stays_held_is_given_up() {
        let (one, other) = open_twice();
        lock_within(&one, LockKind::Shared, LONG).unwrap();
        lock_within(&other, LockKind::Shared, LONG).unwrap();
        for limit in [Duration::ZERO, Duration::from_millis(5)] {
            let refused = lock_within(&other, LockKind::Exclusive, limit);
            assert!(matches!(refused, Err(TryLockError::WouldBlock)));
        }
    }

    #[test]
    fn a_lock_is_taken_once_it_is_released() {
        let (one, other) = open_twice();
        lock_within(&one, LockKind::Exclusive, LONG).unwrap();
        let waiting = thread::spawn(move || lock_within(&other, LockKind::Exclusive, LONG));
        drop(one);
        waiting.join().unwrap().unwrap();
    }
}
