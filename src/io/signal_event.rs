//! Eventfd that signals make readable: one descriptor for all of them.
#![allow(unsafe_code)] // The crate has no safe form for an eventfd.

use std::ffi::c_int;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};

/// Returns an eventfd for [`signal`].
///
/// # Errors
/// The process has no descriptor left.
pub fn new() -> io::Result<Arc<OwnedFd>> {
    let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
    Ok(Arc::new(eventfd(0, flags)?))
}

/// Makes `event` readable when `signal` comes, for the rest of the process's life.
///
/// # Errors
/// `sigaction(2)` fails.
pub fn signal(signal: c_int, event: Arc<OwnedFd>) -> io::Result<()> {
    let notify = move || {
        // It fails if the counter is at its limit: the eventfd is readable then.
        let _ = rustix::io::write(&event, &1u64.to_le_bytes());
    };
    // SAFETY: the action makes one system call, which is safe in a signal handler, and sets no `errno`.
    unsafe { signal_hook::low_level::register(signal, notify) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use signal_hook::consts::SIGUSR2;
    use signal_hook::low_level::raise;

    #[test]
    fn a_signal_makes_the_eventfd_readable() {
        let event = super::new().unwrap();
        super::signal(SIGUSR2, event.clone()).unwrap();
        let is_readable = || {
            let mut polled = [PollFd::new(&*event, PollFlags::IN)];
            poll(&mut polled, Some(&Timespec::default())).unwrap() == 1
        };
        assert!(!is_readable());
        raise(SIGUSR2).unwrap();
        assert!(is_readable());
    }
}
