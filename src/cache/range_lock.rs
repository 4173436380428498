//! Locks on units of a blob: locks on bytes of its presence map, two bytes a unit, that belong to the open
//! file description (`F_OFD_SETLK`). [`Purpose`] says what a process locks a unit for.
//!
//! They exclude other processes, and other open descriptions of this one. Closing the last descriptor
//! releases them, so that a killed process leaves none.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use crate::format::presence::UnitRange;

/// What units are locked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// A process fetches them. Others wait for a while, and then fetch them as well.
    Fetch,
    /// Their bytes are written, or must not change.
    Store,
}

impl Purpose {
    /// Byte of the file that stands for unit 0.
    const fn base(self) -> u64 {
        match self {
            Self::Fetch => 0,
            Self::Store => 1 << 62,
        }
    }
}

/// Locks `units` exclusively, and returns whether that succeeded. Never waits.
///
/// # Errors
/// The file system has no locks, or the range ends after 2^62.
pub(super) fn try_lock(file: &File, purpose: Purpose, units: UnitRange) -> io::Result<bool> {
    match set(file, libc::F_WRLCK, purpose, units) {
        Err(error) => match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EACCES) => Ok(false),
            _ => Err(error),
        },
        Ok(()) => Ok(true),
    }
}

/// Unlocks `units`.
///
/// # Errors
/// As [`try_lock`].
pub(super) fn unlock(file: &File, purpose: Purpose, units: UnitRange) -> io::Result<()> {
    set(file, libc::F_UNLCK, purpose, units)
}

fn set(file: &File, kind: libc::c_int, purpose: Purpose, units: UnitRange) -> io::Result<()> {
    if units.end() > Purpose::Store.base() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let too_far = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let start = i64::try_from(purpose.base() + units.start()).map_err(too_far)?;
    let len = i64::try_from(units.len()).map_err(too_far)?;
    if len == 0 {
        return Ok(()); // to the kernel, length 0 means up to the end of the file
    }
    // SAFETY: `flock` is a plain structure of integers; all zeros is a valid value.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = start;
    lock.l_len = len;
    loop {
        // SAFETY: the descriptor is open for as long as `file` is borrowed, and the kernel reads
        // one `flock` structure, which lives until the call returns.
        let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) };
        if result == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Purpose::{Fetch, Store};
    use super::*;

    #[test]
    fn ranges_exclude_other_descriptions_until_they_close() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || {
            let mut options = File::options();
            options.read(true).write(true).open(file.path()).unwrap()
        };
        let (first, second) = (open(), open());
        assert!(try_lock(&first, Fetch, UnitRange::new(3, 5)).unwrap());
        assert!(
            try_lock(&first, Fetch, UnitRange::new(3, 5)).unwrap(),
            "its own"
        );
        assert!(!try_lock(&second, Fetch, UnitRange::new(4, 9)).unwrap());
        assert!(try_lock(&second, Fetch, UnitRange::new(5, 9)).unwrap());
        assert!(
            try_lock(&second, Fetch, UnitRange::new(4, 4)).unwrap(),
            "nothing"
        );
        assert!(try_lock(&second, Store, UnitRange::new(3, 5)).unwrap());
        assert!(!try_lock(&first, Store, UnitRange::new(4, 5)).unwrap());
        unlock(&first, Fetch, UnitRange::new(4, 5)).unwrap();
        assert!(try_lock(&second, Fetch, UnitRange::new(4, 5)).unwrap());
        assert!(!try_lock(&second, Fetch, UnitRange::new(3, 4)).unwrap());
        let kept = first.try_clone().unwrap();
        drop(first);
        assert!(!try_lock(&second, Fetch, UnitRange::new(3, 4)).unwrap());
        drop(kept);
        assert!(try_lock(&second, Fetch, UnitRange::new(3, 4)).unwrap());
        assert!(try_lock(&second, Fetch, UnitRange::one(u64::MAX - 1)).is_err());
    }
}
