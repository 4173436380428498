//! Locks on byte ranges of a file that belong to the open file description (`F_OFD_SETLK`).
//!
//! They exclude other processes, and other open descriptions of this one; they go with the last
//! descriptor, so that a killed process leaves none.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

/// Locks `bytes` against other writers, and returns whether that succeeded. Never waits.
///
/// # Errors
/// The file system has no locks, or the range is absurd.
pub(super) fn try_lock(file: &File, bytes: &Range<u64>) -> io::Result<bool> {
    match set(file, libc::F_WRLCK, bytes) {
        Err(error) => match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EACCES) => Ok(false),
            _ => Err(error),
        },
        Ok(()) => Ok(true),
    }
}

/// Unlocks `bytes`.
///
/// # Errors
/// As [`try_lock`].
pub(super) fn unlock(file: &File, bytes: &Range<u64>) -> io::Result<()> {
    set(file, libc::F_UNLCK, bytes)
}

fn set(file: &File, kind: libc::c_int, bytes: &Range<u64>) -> io::Result<()> {
    let absurd = || io::Error::from(io::ErrorKind::InvalidInput);
    let start = i64::try_from(bytes.start).map_err(|_| absurd())?;
    let len = bytes.end.checked_sub(bytes.start).ok_or_else(absurd)?;
    let len = i64::try_from(len).map_err(|_| absurd())?;
    if len == 0 {
        return Ok(()); // for the kernel, 0 is everything to the end
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
    use super::*;

    #[test]
    fn ranges_exclude_other_descriptions_until_they_close() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || {
            let mut options = File::options();
            options.read(true).write(true).open(file.path()).unwrap()
        };
        let (first, second) = (open(), open());
        assert!(try_lock(&first, &(3..5)).unwrap());
        assert!(try_lock(&first, &(3..5)).unwrap(), "its own");
        assert!(!try_lock(&second, &(4..9)).unwrap());
        assert!(try_lock(&second, &(5..9)).unwrap());
        assert!(try_lock(&second, &(4..4)).unwrap(), "nothing");
        unlock(&first, &(4..5)).unwrap();
        assert!(try_lock(&second, &(4..5)).unwrap());
        assert!(!try_lock(&second, &(3..4)).unwrap());
        let kept = first.try_clone().unwrap();
        drop(first);
        assert!(!try_lock(&second, &(3..4)).unwrap());
        drop(kept);
        assert!(try_lock(&second, &(3..4)).unwrap());
        #[allow(clippy::reversed_empty_ranges)]
        let absurd = [u64::MAX - 1..u64::MAX, 7..3];
        for range in absurd {
            assert!(try_lock(&second, &range).is_err());
        }
    }
}
