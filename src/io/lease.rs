//! Tells whether another process has a file open: by a lease (`F_SETLEASE` of `fcntl(2)`), which the kernel grants for a
//! file that is open once only.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::thread;
use std::time::{Duration, Instant};

/// Sets the signal of a lease; `libc` lacks it. The number is that of `<linux/fcntl.h>`.
const F_SETSIG: libc::c_int = 10;

/// Pause between two attempts.
const PAUSE: Duration = Duration::from_millis(2);

/// Returns whether `file`, which is open for reading, is open elsewhere too and stays so for `limit`: the kernel closes the
/// files of a killed process a moment after its end. `None`: the file system has no leases, or the file belongs to another
/// user.
pub fn is_open_elsewhere(file: &File, limit: Duration) -> Option<bool> {
    let start = Instant::now();
    loop {
        match has_lease(file) {
            Ok(true) => return Some(false),
            Ok(false) if start.elapsed() < limit => thread::sleep(PAUSE),
            Ok(false) => return Some(true),
            Err(_) => return None,
        }
    }
}

/// Takes a lease and gives it back. Returns whether the kernel granted it.
fn has_lease(file: &File) -> io::Result<bool> {
    // The signal to a process whose lease is asked back. The default, SIGIO, would kill this process.
    control(file, F_SETSIG, libc::SIGURG)?;
    match control(file, libc::F_SETLEASE, libc::F_WRLCK) {
        Ok(()) => control(file, libc::F_SETLEASE, libc::F_UNLCK).map(|()| true),
        Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => Ok(false),
        Err(error) => Err(error),
    }
}

fn control(file: &File, command: libc::c_int, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the descriptor is open for as long as `file` is borrowed, and these commands take an integer.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, value) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Long enough for any machine: it turns a hang into a failure.
    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn a_file_is_open_elsewhere_until_the_other_descriptor_is_closed() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.into_temp_path();
        let open = || File::open(&path).unwrap();
        let one = open();
        assert_eq!(is_open_elsewhere(&one, Duration::ZERO), Some(false));
        let other = open();
        assert_eq!(is_open_elsewhere(&one, Duration::ZERO), Some(true));
        let waiting = thread::spawn(move || is_open_elsewhere(&one, LONG));
        drop(other);
        assert_eq!(waiting.join().unwrap(), Some(false));
    }
}
