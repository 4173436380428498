//! Interrupts system calls that another process can block without a time limit.
//!
//! A front-end shares the descriptors that it sends: it can clear `O_NONBLOCK` between a check and a call,
//! fill a counter, or make a socket linger on close. Such calls run inside [`PeerCall::run`].
//! [`PeerCall::interrupt`] sends the thread a signal with an empty handler, so that the call returns
//! `EINTR`.
#![allow(unsafe_code)]

use std::io;
use std::process;
use std::sync::Once;
use std::sync::atomic::{AtomicI32, Ordering};

use libc::{c_int, c_void, siginfo_t};
use rustix::thread::gettid;
use vmm_sys_util::signal::register_signal_handler;

/// The signal that interrupts a call. Its default action is to be ignored, so one that another process
/// sends has no effect.
const SIGNAL: c_int = libc::SIGURG;

/// Value of [`PeerCall::thread`] outside a call.
const NONE: i32 = 0;

thread_local! {
    static THREAD: i32 = gettid().as_raw_nonzero().get();
}

/// Calls of one thread that a peer can block.
#[derive(Debug, Default)]
pub struct PeerCall {
    /// Id of the thread that is in a call now, or [`NONE`].
    thread: AtomicI32,
}

impl PeerCall {
    /// Runs `call`, which [`PeerCall::interrupt`] can interrupt. One thread at a time.
    pub fn run<T>(&self, call: impl FnOnce() -> T) -> T {
        let thread = THREAD.try_with(|thread| *thread).unwrap_or(NONE);
        self.thread.store(thread, Ordering::SeqCst);
        let result = call();
        self.thread.store(NONE, Ordering::SeqCst);
        result
    }

    /// Interrupts the current call, if there is one. The call may wait later or again, so the caller
    /// repeats this until the thread has left the call.
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
            // SAFETY: passes no memory. `thread` is or was a thread of this process, and the signal has no
            // effect on other threads.
            unsafe { libc::syscall(libc::SYS_tgkill, process::id(), thread, SIGNAL) };
        }
    }
}

/// The signal handler. Its return makes the interrupted call fail with `EINTR`.
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
