//! Survives files that shrink under their mapping.
//!
//! Touching a mapped page past the end of its file, or one the disk cannot deliver, raises SIGBUS,
//! which would end a daemon that serves many machines because one file was cut. A [`Watch`] names
//! an address range where that may happen: on a fault there, the handler puts anonymous zeros in
//! the range's place, so that the access completes, and notes that the range is lost. Whoever
//! copied from it asks [`Watch::is_lost`] afterwards and throws the bytes away.
//!
//! A fault anywhere else still ends the process.
#![allow(unsafe_code)]

use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};

use libc::{c_int, c_void, siginfo_t};

/// Ranges that can be watched at a time. A fixed table, because a signal handler must not lock.
const SLOTS: usize = 8192;

struct Slot {
    /// First address; 0 while the slot is free.
    start: AtomicUsize,
    len: AtomicUsize,
    lost: AtomicBool,
}

static TABLE: [Slot; SLOTS] = [const {
    Slot {
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        lost: AtomicBool::new(false),
    }
}; SLOTS];

/// Taken while a slot is claimed, never by the handler.
static CLAIM: std::sync::Mutex<()> = std::sync::Mutex::new(());

static INSTALL: Once = Once::new();

/// A range under watch, until dropped. It must be dropped before the range is unmapped.
#[derive(Debug)]
pub struct Watch {
    slot: usize,
}

impl Watch {
    /// Watches `len` bytes at `start`; `None` if the table of 8192 ranges is full.
    pub fn new(start: *const u8, len: usize) -> Option<Watch> {
        INSTALL.call_once(install);
        let _claim = CLAIM
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        let slot = TABLE
            .iter()
            .position(|slot| slot.start.load(Ordering::Relaxed) == 0)?;
        TABLE[slot].lost.store(false, Ordering::Relaxed);
        TABLE[slot].len.store(len, Ordering::Relaxed);
        TABLE[slot].start.store(start.addr(), Ordering::Release);
        Some(Watch { slot })
    }

    /// Whether a fault hit the range: what was read from it since then is zeros, what was
    /// written is gone.
    pub fn is_lost(&self) -> bool {
        // What was copied before this call must not be read after the flag is.
        fence(Ordering::Acquire);
        TABLE[self.slot].lost.load(Ordering::Acquire)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        TABLE[self.slot].start.store(0, Ordering::Release);
    }
}

fn install() {
    // SAFETY: `handler` has the signature SA_SIGINFO asks for and does only what a signal handler
    // may: atomics and system calls. The struct is zeroed and then filled.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER | libc::SA_ONSTACK;
        libc::sigemptyset(&mut action.sa_mask);
        libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut())
    };
    if result != 0 {
        log::warn!(
            "cannot install the SIGBUS handler: {}",
            std::io::Error::last_os_error()
        );
    }
}

extern "C" fn handler(_signal: c_int, info: *mut siginfo_t, _context: *mut c_void) {
    // SAFETY: the kernel passes a valid siginfo, and SIGBUS carries an address.
    let (address, code) = unsafe { ((*info).si_addr().addr(), (*info).si_code) };
    if code <= 0 {
        // Somebody sent it: there was no access, so nothing would fault again.
        // SAFETY: both calls are allowed in a handler.
        unsafe {
            libc::signal(libc::SIGBUS, libc::SIG_DFL);
            libc::raise(libc::SIGBUS);
        }
        return;
    }
    for slot in &TABLE {
        let start = slot.start.load(Ordering::Acquire);
        let len = slot.len.load(Ordering::Acquire);
        if start == 0 || address.wrapping_sub(start) >= len {
            continue;
        }
        // Another thread may have let go of the slot and taken it anew in between: only if the
        // start is still the same do both belong together.
        if slot.start.load(Ordering::Acquire) != start {
            continue;
        }
        slot.lost.store(true, Ordering::Release);
        // SAFETY: the range is a live mapping of this process, watched by its owner, who lets go
        // of the watch before unmapping it. New zero pages in its place keep every pointer into
        // it valid. `mmap` is a plain system call and safe in a handler.
        let mapped = unsafe {
            libc::mmap(
                std::ptr::without_provenance_mut(start),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if mapped != libc::MAP_FAILED {
            return;
        }
    }
    // Not ours: let the access fault again, with the default action.
    // SAFETY: resetting a signal to its default is allowed in a handler.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
}
