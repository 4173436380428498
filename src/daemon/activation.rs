//! A socket that the service manager made and passes on (`sd_listen_fds(3)`).
//!
//! The socket outlives the daemon: a front-end that connects while no daemon runs waits for the
//! next one.
#![allow(unsafe_code)]

use std::env;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::net::sockopt::{socket_acceptconn, socket_domain, socket_type};
use rustix::net::{AddressFamily, SocketType};

/// Why what was passed is of no use.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The environment announces descriptors that are not there, or not as numbers.
    #[error("LISTEN_FDS and LISTEN_PID announce what is not there")]
    Environment(#[source] io::Error),
    /// A device has one socket.
    #[error("expected 1 socket, found {found}")]
    Count {
        /// How many there are.
        found: usize,
    },
    /// Descriptor 3 is something else.
    #[error("descriptor 3 is no listening Unix stream socket")]
    NotAListener,
}

/// Whether the environment announces a socket, for this process or another.
pub fn is_offered() -> bool {
    env::var_os("LISTEN_FDS").is_some() && env::var_os("LISTEN_PID").is_some()
}

/// The socket passed to this process, if one is. Call it before anything is opened, so that the
/// descriptor is what its number says; a second call finds nothing.
///
/// # Errors
///
/// Something was passed, and it is not one listening Unix stream socket.
pub fn take() -> Result<Option<UnixListener>, Error> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let mut passed = sd_notify::listen_fds().map_err(Error::Environment)?;
    let (first, found) = (passed.next(), passed.len() + 1);
    let Some(number) = first.filter(|_| !TAKEN.swap(true, Ordering::Relaxed)) else {
        return Ok(None);
    };
    if found != 1 {
        return Err(Error::Count { found });
    }
    // SAFETY: the descriptor is open, for its flags were just changed; it was so before the program
    // started, and nobody else here takes it, now or later.
    let socket = unsafe { OwnedFd::from_raw_fd(number) };
    let listens = socket_domain(&socket) == Ok(AddressFamily::UNIX)
        && socket_type(&socket) == Ok(SocketType::STREAM)
        && socket_acceptconn(&socket) == Ok(true);
    if !listens {
        return Err(Error::NotAListener);
    }
    Ok(Some(UnixListener::from(socket)))
}
