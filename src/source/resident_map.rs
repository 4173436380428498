//! Copies pages of a blob that are in memory without a system call.
//!
//! The blob is mapped. One bit per page is set when the page was read, and cleared when pages are
//! known to have been evicted. A page with its bit set is copied from the mapping. Any other page is
//! read through the descriptor, so that a worker does not wait for storage in a page fault. The
//! kernel may still evict a page whose bit is set; the next access is then a major fault. Workers
//! count major faults, call [`ResidentMap::forget`], and read pages until their bits are set again.
//!
//! An access to a truncated file faults only beyond the page in which the file ends; the rest of that page
//! reads as zeros. The map therefore keeps the last byte of the blob that is not zero. While the mapping
//! still has that byte, nothing before it is missing.
#![allow(unsafe_code)]

use std::fs::File;
use std::ops::Range;
use std::sync::atomic::{Ordering, fence};

use vm_memory::{Bytes, VolatileSlice};

use crate::io::bitmap::AtomicBitmap;
use crate::io::mapped_file::{Access, MapError, MappedFile};
use crate::io::prefetch;

/// Bytes per bit. At most the page size; where pages are larger, several bits cover one page.
pub const PAGE: u64 = 4096;

/// Longest blob that is mapped, in bytes: its bits take 2 MiB. A sparse file may be of any length.
const MAX_MAPPED: u64 = 64 << 30;

/// Number of bytes at the end of a blob of which one must not be zero: more than the zeros at the end of a
/// layer's trailer and of a tar file.
pub const TAIL: u64 = 8 << 10;

/// Number of cache lines of a range that are prefetched: 4 KiB. The hardware prefetcher continues.
const LINES: usize = 64;

/// A mapped blob.
#[derive(Debug)]
pub struct ResidentMap {
    mapping: MappedFile,
    /// Pages known to be in memory.
    known: AtomicBitmap,
    /// Offset and value of the last byte that is not zero.
    last: (usize, u8),
}

/// Why a blob cannot be mapped for copying pages in memory.
#[derive(Debug, thiserror::Error)]
pub enum ResidentMapError {
    /// The file cannot be mapped.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The file ends in zeros, so that a truncation would go unnoticed.
    #[error("the last {TAIL} bytes are zeros")]
    Zeros,
}

impl ResidentMap {
    /// Maps the first `len` bytes of `file`, at most 64 GiB, the last of which are `tail`.
    ///
    /// # Errors
    /// [`ResidentMapError::Map`] if they cannot be mapped, [`ResidentMapError::Zeros`] if `tail` has
    /// only zeros.
    pub fn new(file: &File, len: u64, tail: &[u8]) -> Result<ResidentMap, ResidentMapError> {
        let (at, byte) = last_byte(len, tail)?;
        Self::ending_in(file, len, at, byte)
    }

    /// Maps the first `len` bytes of `file`, at most 64 GiB, whose last byte that is not zero is `byte`
    /// at offset `at`.
    ///
    /// # Errors
    /// [`ResidentMapError::Map`] if they cannot be mapped.
    pub fn ending_in(
        file: &File,
        len: u64,
        at: u64,
        byte: u8,
    ) -> Result<ResidentMap, ResidentMapError> {
        let absurd = MapError::Range { offset: 0, len };
        let at = usize::try_from(at)
            .ok()
            .filter(|_| len <= MAX_MAPPED && at < len);
        let at = at.ok_or(absurd)?;
        let mapping = MappedFile::new(file, 0, len, Access::Read)?;
        Ok(ResidentMap {
            mapping,
            known: AtomicBitmap::new(len.div_ceil(PAGE)),
            last: (at, byte),
        })
    }

    /// The last byte that is not zero, and where it is.
    pub fn last_byte(&self) -> (u64, u8) {
        (self.last.0 as u64, self.last.1)
    }

    /// Numbers of the pages of a range, at least one page.
    #[inline]
    fn pages(offset: u64, len: usize) -> Range<u64> {
        offset / PAGE..(offset + (len as u64).max(1)).div_ceil(PAGE)
    }

    /// Returns `len` bytes at `offset`, if all their pages are known to be in memory.
    ///
    /// The caller copies them and then checks [`ResidentMap::is_lost`]: if true, the copy is not the content of
    /// the file.
    pub fn resident(&self, offset: u64, len: usize) -> Option<VolatileSlice<'_>> {
        let slice = self.mapping.slice(usize::try_from(offset).ok()?, len)?;
        (self.known.all(Self::pages(offset, len)) && !self.mapping.is_lost()).then_some(slice)
    }

    /// Marks the pages of a range of the blob as in memory, because it was just read.
    pub fn note(&self, offset: u64, len: usize) {
        self.known.set(Self::pages(offset, len));
    }

    /// Clears all bits, because some pages were evicted.
    pub fn forget(&self) {
        self.known.clear_all();
    }

    /// Whether the file was truncated, or its storage failed, while it was mapped.
    pub fn is_lost(&self) -> bool {
        // Keeps copies made before this call from being reordered after the load of the byte.
        fence(Ordering::Acquire);
        let (at, expected) = self.last;
        let found = self
            .mapping
            .slice(at, 1)
            .map(|byte| byte.load::<u8>(0, Ordering::Relaxed));
        !matches!(found, Some(Ok(found)) if found == expected) || self.mapping.is_lost()
    }

    /// Prefetches the bits of a range's pages, and their entries in the page tables.
    pub fn prefetch_pages(&self, offset: u64, len: usize) {
        if let Ok(start) = usize::try_from(offset)
            && let Some(slice) = self.mapping.slice(start, len)
        {
            prefetch::ends(slice);
            self.known.prefetch(offset / PAGE);
            if let Some(last) = self.mapping.slice(self.last.0, 1) {
                prefetch::ends(last);
            }
        }
    }

    /// Prefetches the first bytes of a range.
    pub fn prefetch(&self, offset: u64, len: usize) {
        if let Ok(offset) = usize::try_from(offset)
            && let Some(slice) = self.mapping.slice(offset, len)
        {
            prefetch::bulk(slice, LINES);
        }
    }
}

/// The last byte that is not zero of a file of `len` bytes that ends in `tail`, and where it is.
fn last_byte(len: u64, tail: &[u8]) -> Result<(u64, u8), ResidentMapError> {
    let nonzero = tail.iter().rposition(|byte| *byte != 0);
    let at = nonzero.ok_or(ResidentMapError::Zeros)?;
    let start = len.saturating_sub(tail.len() as u64);
    Ok((start + at as u64, tail[at]))
}

/// Number of page faults of this thread that waited for storage. An increase means that mapped pages were
/// evicted.
pub fn major_faults() -> u64 {
    // SAFETY: all zeros is a valid `rusage`, which the call fills.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_THREAD, &mut usage);
        usage
    };
    u64::try_from(usage.ru_majflt).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    fn map(file: &File, len: u64) -> Result<ResidentMap, ResidentMapError> {
        let mut tail = vec![0; len.min(TAIL) as usize];
        let start = len - tail.len() as u64;
        file.read_exact_at(&mut tail, start).unwrap();
        ResidentMap::new(file, len, &tail)
    }

    #[test]
    fn only_noted_pages_are_resident() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7], 200 * PAGE + 9).unwrap();
        let resident_map = map(&file, 200 * PAGE + 10).unwrap();
        assert!(resident_map.resident(0, 1).is_none());
        resident_map.note(PAGE * 62 + 5, 3 * PAGE as usize);
        for (offset, len, expected) in [
            (62 * PAGE, 4 * PAGE, true),
            (62 * PAGE, 4 * PAGE + 1, false),
            (62 * PAGE - 1, 2, false),
            (65 * PAGE + 100, 1, true),
            (66 * PAGE, 1, false),
        ] {
            assert_eq!(
                resident_map.resident(offset, len as usize).is_some(),
                expected,
                "{offset}+{len}"
            );
        }
        resident_map.note(0, 200 * PAGE as usize + 10);
        assert!(resident_map.resident(0, 200 * PAGE as usize + 10).is_some());
        assert!(
            resident_map.resident(200 * PAGE, 11).is_none(),
            "past the end"
        );
        resident_map.forget();
        assert!(resident_map.resident(62 * PAGE, 1).is_none());
    }

    #[test]
    fn a_cut_file_is_no_longer_resident() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7], 3 * PAGE - 1).unwrap();
        let resident_map = map(&file, 3 * PAGE).unwrap();
        resident_map.note(0, 3 * PAGE as usize);
        let slice = resident_map.resident(2 * PAGE, 8).unwrap();
        file.set_len(PAGE).unwrap();
        slice.copy_to(&mut [0u8; 8][..]);
        assert!(resident_map.is_lost());
        assert!(resident_map.resident(0, 1).is_none());
    }
    #[test]
    fn a_file_cut_inside_a_page_is_noticed_until_it_is_whole() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 3000], 0).unwrap();
        file.set_len(PAGE + 500).unwrap();
        let resident_map = map(&file, PAGE + 500).unwrap();
        resident_map.note(0, PAGE as usize);
        file.set_len(2999).unwrap();
        let mut byte = [7u8];
        resident_map
            .resident(2999, 1)
            .unwrap()
            .copy_to(&mut byte[..]);
        assert_eq!(byte, [0], "no fault");
        assert!(resident_map.is_lost());
        file.write_all_at(&[7], 2999).unwrap();
        assert!(!resident_map.is_lost());
    }

    #[test]
    fn a_file_that_ends_in_zeros_has_no_window() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7], 0).unwrap();
        file.set_len(TAIL + 1).unwrap();
        let error = map(&file, TAIL + 1).unwrap_err();
        assert!(matches!(error, ResidentMapError::Zeros), "{error}");
        assert!(map(&file, TAIL).is_ok());
    }
}
