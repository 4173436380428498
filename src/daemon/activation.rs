//! Socket activation: a listening socket that the service manager passes (`sd_listen_fds(3)`).
//!
//! The socket outlives the daemon: a front-end that connects while no daemon runs waits for the
//! next one.
#![allow(unsafe_code)]

use std::env;
use std::ffi::OsString;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};

use super::handover;

/// The passed socket cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `LISTEN_FDS` or `LISTEN_PID` is not a number, or names descriptors that are not open.
    #[error(
        "LISTEN_FDS and LISTEN_PID: expected the number of open descriptors and a process, found \
         {descriptors:?} and {process:?}"
    )]
    Environment {
        /// Value of `LISTEN_FDS`.
        descriptors: OsString,
        /// Value of `LISTEN_PID`.
        process: OsString,
        /// Why they cannot be used.
        source: io::Error,
    },
    /// The service manager passed several sockets; a disk has one.
    #[error("expected 1 socket, found {found}")]
    Count {
        /// Number of sockets.
        found: usize,
    },
    /// Descriptor 3 is not a listening Unix stream socket.
    #[error("descriptor 3: expected a listening Unix stream socket, found something else")]
    NotAListener,
}

/// Returns whether the environment names a passed socket, for this process or another.
pub fn is_offered() -> bool {
    env::var_os("LISTEN_FDS").is_some() && env::var_os("LISTEN_PID").is_some()
}

/// Takes the socket that was passed to this process, if there is one. Call it before any file is opened, so
/// that descriptor 3 is the passed one. A second call returns `None`.
///
/// # Errors
///
/// [`Error`] if anything but one listening Unix stream socket was passed.
pub fn take() -> Result<Option<UnixListener>, Error> {
    let mut passed = sd_notify::listen_fds().map_err(environment)?;
    let (first, found) = (passed.next(), passed.len() + 1);
    let Some(number) = first.filter(|_| !TAKEN.swap(true, Ordering::Relaxed)) else {
        return Ok(None);
    };
    if found != 1 {
        return Err(Error::Count { found });
    }
    // SAFETY: the descriptor is open, for its flags were just changed; it was so before the program
    // started, and `TAKEN` keeps any other call from taking it.
    let socket = unsafe { OwnedFd::from_raw_fd(number) };
    let socket = handover::listening(socket).ok_or(Error::NotAListener)?;
    Ok(Some(socket))
}

/// Takes all descriptors that were passed to this process, with their names (`LISTEN_FDNAMES`). A second call returns
/// none.
///
/// # Errors
///
/// [`Error::Environment`] if the environment names descriptors that are not open.
pub fn take_named() -> Result<Vec<(String, OwnedFd)>, Error> {
    let passed = sd_notify::listen_fds_with_names().map_err(environment)?;
    if TAKEN.swap(true, Ordering::Relaxed) {
        return Ok(Vec::new());
    }
    let taken = passed.map(|(number, name)| {
        // SAFETY: the descriptor is open, for its flags were just changed; it was so before the program
        // started, and `TAKEN` keeps any other call from taking it.
        (name, unsafe { OwnedFd::from_raw_fd(number) })
    });
    Ok(taken.collect())
}

/// Whether the passed descriptors have an owner.
static TAKEN: AtomicBool = AtomicBool::new(false);

fn environment(source: io::Error) -> Error {
    Error::Environment {
        descriptors: env::var_os("LISTEN_FDS").unwrap_or_default(),
        process: env::var_os("LISTEN_PID").unwrap_or_default(),
        source,
    }
}
