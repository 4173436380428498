//! Prefetch hints to the processor.
//!
//! A hint never faults and never changes the behaviour of a program. On other processors than x86-64 it
//! does nothing.
#![allow(unsafe_code)]

use vm_memory::VolatileSlice;

/// Bytes of a cache line, or less.
const LINE: usize = 64;

/// Prefetches the cache line in which `value` starts into the first-level cache.
#[inline]
pub fn value<T>(value: &T) {
    near(std::ptr::from_ref(value).cast());
}

/// Prefetches the first `lines` cache lines of `slice` into the first-level cache.
pub fn start(slice: VolatileSlice<'_>, lines: usize) {
    each_line::<4>(slice, lines, near);
}

/// Prefetches the first and the last byte of `slice` into the first-level cache, and with them the
/// page-table entries of their pages.
pub fn ends(slice: VolatileSlice<'_>) {
    let start = slice.ptr_guard();
    near(start.as_ptr());
    near(start.as_ptr().wrapping_add(slice.len().saturating_sub(1)));
}

/// Prefetches the first `lines` cache lines of `slice` into the second-level cache: they would evict too
/// much from the first.
pub fn bulk(slice: VolatileSlice<'_>, lines: usize) {
    each_line::<8>(slice, lines, far);
}

/// Calls `prefetch` with the first `lines` cache lines of `slice`, `ROUND` in a round: a loop over single
/// lines would spend most of its instructions on counting.
#[inline]
fn each_line<const ROUND: usize>(
    slice: VolatileSlice<'_>,
    lines: usize,
    prefetch: impl Fn(*const u8),
) {
    let start = slice.ptr_guard();
    let mut at = start.as_ptr();
    let lines = lines.min(slice.len().div_ceil(LINE));
    for _ in 0..lines / ROUND {
        (0..ROUND).for_each(|line| prefetch(at.wrapping_add(line * LINE)));
        at = at.wrapping_add(ROUND * LINE);
    }
    (0..lines % ROUND).for_each(|line| prefetch(at.wrapping_add(line * LINE)));
}

#[cfg(target_arch = "x86_64")]
#[inline]
fn near(at: *const u8) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    // SAFETY: a prefetch of any address never faults.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
}

#[cfg(target_arch = "x86_64")]
#[inline]
fn far(at: *const u8) {
    use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
    // SAFETY: a prefetch of any address never faults.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) };
}

#[cfg(not(target_arch = "x86_64"))]
fn near(_: *const u8) {}

#[cfg(not(target_arch = "x86_64"))]
fn far(_: *const u8) {}
