//! Handles SIGBUS of files that are truncated while they are mapped.
//!
//! An access to a mapped page beyond the end of its file, or to one that storage cannot deliver, raises
//! SIGBUS, whose default action ends the process. A [`Watch`] names an address range in which such
//! faults are expected. The signal handler replaces the range by anonymous zeros, so that the access
//! completes, and marks the range as lost. Code that copies from the range calls [`Watch::is_lost`]
//! afterwards, and discards the bytes of a lost range.
//!
//! A fault at any other address ends the process.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Once, OnceLock};

use libc::{c_int, c_void, siginfo_t};

use super::range_table::RangeTable;

/// Most ranges that can be watched at a time. The table is fixed because a signal handler must not allocate.
pub const SLOTS: usize = 8192;

static TABLE: RangeTable<SLOTS> = RangeTable::new();

static INSTALL: Once = Once::new();

/// Counters in memory that outlives the process.
static COUNTERS: OnceLock<Counters> = OnceLock::new();

#[derive(Debug)]
struct Counters {
    faults: &'static AtomicU64,
    used: &'static AtomicU64,
}

/// Counts faults in watched ranges in `faults` from now on, and keeps the number of watched ranges in `used`. Call it
/// once, while the process has one thread.
pub fn count_in(faults: &'static AtomicU64, used: &'static AtomicU64) {
    used.store((SLOTS - free_ranges()) as u64, Ordering::Relaxed);
    // Only the first counters of a process are used.
    let _ = COUNTERS.set(Counters { faults, used });
}

/// Watches a range until dropped. Drop it before the range is unmapped.
#[derive(Debug)]
pub struct Watch {
    number: u16,
}

impl Watch {
    /// Watches `len` bytes at `start`; `None` if 8192 ranges are watched already.
    pub fn new(start: *const u8, len: usize) -> Option<Watch> {
        INSTALL.call_once(install);
        let number = TABLE.add(start.addr(), len)?;
        if let Some(counters) = COUNTERS.get() {
            counters.used.fetch_add(1, Ordering::Relaxed);
        }
        Some(Watch { number })
    }

    /// Returns whether an access to the range faulted. Bytes read since then are zeros, and bytes written
    /// are lost.
    pub fn is_lost(&self) -> bool {
        // Keeps copies made before this call from being reordered after the load of the mark.
        fence(Ordering::Acquire);
        TABLE.is_marked(self.number)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        TABLE.remove(self.number);
        if let Some(counters) = COUNTERS.get() {
            counters.used.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Number of ranges that can still be watched. Each mapped file, guest memory region, in-flight area and
/// dirty log takes one.
pub fn free_ranges() -> usize {
    TABLE.free()
}

fn install() {
    // SAFETY: `handler` has the signature of an SA_SIGINFO handler and is async-signal-safe: it uses
    // atomics and system calls only. All zeros is a valid `sigaction`.
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
        // Sent by a process: there was no access that would fault again with the default action.
        // SAFETY: both calls are allowed in a handler.
        unsafe {
            libc::signal(libc::SIGBUS, libc::SIG_DFL);
            libc::raise(libc::SIGBUS);
        }
        return;
    }
    // A range is accessed only while it is watched, so the range of a faulting access stays in the table
    // until the access completes.
    if let Some((number, start, len)) = TABLE.find(address) {
        TABLE.mark(number);
        // SAFETY: the range is mapped: its owner drops the watch before it unmaps the range. New zero pages
        // in its place keep every pointer into it valid. `mmap` is a system call, safe in a handler.
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
            // The counters may lie in the range, which is in memory now. Reading an initialized cell takes no lock.
            if let Some(counters) = COUNTERS.get() {
                counters.faults.fetch_add(1, Ordering::Relaxed);
            }
            return;
        }
    }
    // An access outside all ranges faults again, with the default action.
    // SAFETY: resetting a signal to its default is allowed in a handler.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
}
