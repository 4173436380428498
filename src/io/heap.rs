//! The heap of the process.
#![allow(unsafe_code)] // `malloc_trim` has no safe form

/// Returns free memory of the heap to the system. Opening a disk allocates and frees more than serving it
/// needs, and the C library keeps what was freed.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the call takes a number, and may be made while other threads allocate.
    unsafe {
        libc::malloc_trim(0);
    }
}
