//! Interrupts system calls that another process can block for ever.
//!
//! A descriptor that a front-end sent is shared with it: `O_NONBLOCK` can be cleared between a check
//! and a call, a counter can be filled, a socket can linger when it is closed. Such calls run inside
//! [`PeerCall::run`], and [`PeerCall::interrupt`] ends them: a signal with a handler that does nothing
//! makes them return `EINTR`.
#![allow(unsafe_code)]

use std::io;
use std::process;
use std::sync::Once;
use std::sync::atomic::{AtomicI32, Ordering};

use libc::{c_int, c_void, siginfo_t};
use rustix::thread::gettid;
use vmm_sys_util::signal::register_signal_handler;

/// Interrupts a call. The default action is to ignore it, so that a signal sent from elsewhere does
/// no harm at any time.
const SIGNAL: c_int = libc::SIGURG;

/// [`PeerCall::thread`] outside of a call.
const NONE: i32 = 0;

thread_local! {
    static THREAD: i32 = gettid().as_raw_nonzero().get();
}

/// The calls of one thread that a peer can block.
#[derive(Debug, Default)]
pub struct PeerCall {
    /// The thread that is in a call now.
    thread: AtomicI32,
}

impl PeerCall {
    /// Runs `call`; meanwhile it can be interrupted. One thread at a time.
    pub fn run<T>(&self, call: impl FnOnce() -> T) -> T {
        let thread = THREAD.try_with(|thread| *thread).unwrap_or(NONE);
        self.thread.store(thread, Ordering::SeqCst);
        let result = call();
        self.thread.store(NONE, Ordering::SeqCst);
        result
    }

    /// Interrupts the call under way, if there is one. The call may not have begun to wait, or may wait
    /// again: the caller repeats this until the thread has gone on.
    pub fn interrupt(&self) {
        static HANDLER: Once = Once::new();
        HANDLER.call_once(|| {
            if let Err(error) = register_signal_handler(SIGNAL, nothing) {
                log::error!(
                    "cannot install the signal handler that interrupts blocked calls: {}",
                    io::Error::from(error)
                );
            }
        });
        let thread = self.thread.load(Ordering::SeqCst);
        if thread != NONE {
            // SAFETY: no memory is passed. The number is that of a thread of this process, or of one that
            // ended; the signal is harmless to every thread.
            unsafe { libc::syscall(libc::SYS_tgkill, process::id(), thread, SIGNAL) };
        }
    }
}

/// The handler: its return ends the call with `EINTR`.
extern "C" fn nothing(_: c_int, _: *mut siginfo_t, _: *mut c_void) {}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::Arc;
    use std::thread;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_write_that_blocks_is_broken_off() {
        let (_reader, mut writer) = io::pipe().unwrap();
        let call = Arc::new(PeerCall::default());
        let theirs = call.clone();
        let blocked = thread::spawn(move || {
            loop {
                // More than a pipe holds.
                let written = theirs.run(|| writer.write(&[0; 1 << 20]));
                if let Err(error) = written {
                    return error.kind();
                }
            }
        });
        let start = Instant::now();
        while !blocked.is_finished() {
            assert!(start.elapsed() < Duration::from_secs(60), "it still waits");
            call.interrupt();
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(blocked.join().unwrap(), io::ErrorKind::Interrupted);
    }
}
