//! Memory that the process has used and needs no more: of its heap and of its stack.
#![allow(unsafe_code)] // `malloc_trim` and `madvise` of the stack have no safe form

use std::ffi::c_void;

use rustix::param::page_size;
use rustix::process::getpid;
use rustix::thread::gettid;

/// Bytes of the stack that are returned at most. Opening a disk uses far less.
const STACK: usize = 512 << 10;

/// Pages below the caller's frame that are kept, for the call itself.
const KEPT_PAGES: usize = 2;

/// Returns free memory of heap and stack to the system. Opening a disk uses more of both than serving it,
/// and neither the C library nor the kernel takes back what was used once. To be called by the main thread.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the call takes a number, and may be made while other threads allocate.
    unsafe {
        libc::malloc_trim(0);
    }
    if gettid() == getpid() {
        trim_main_stack();
    }
}

/// Returns the pages below the stack of the running call, which must be on the main thread.
#[inline(never)]
fn trim_main_stack() {
    let local = 0u8;
    let page = page_size();
    let pages = (&raw const local).addr() / page;
    let end = pages.saturating_sub(KEPT_PAGES).saturating_mul(page);
    let start = end.saturating_sub(STACK);
    let at = std::ptr::without_provenance_mut::<c_void>(start);
    // SAFETY: no live frame lies below the running one, and the kernel keeps more than `STACK` bytes below
    // the main thread's stack free of other mappings (the stack guard gap, 1 MiB): only unused pages of
    // this stack lie in the range. They read as zeros when they are used again. The call fails for the
    // part of the range that the stack has not grown to, which has no pages.
    let _ = unsafe { libc::madvise(at, end.saturating_sub(start), libc::MADV_DONTNEED) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_keeps_its_frames() {
        let values = [7u64; 1024];
        trim();
        assert!(
            std::hint::black_box(&values)
                .iter()
                .all(|value| *value == 7)
        );
    }
}
