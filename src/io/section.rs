//! Slices that live on the heap, or in a file that is mapped for reading.
//!
//! A [`Section`] is a pointer and a length, wherever the bytes are, so that reading it costs what a
//! slice costs. A mapped file can be truncated, or its storage can fail: the pages then read as zeros
//! ([`sigbus`](crate::io::sigbus)), and [`MappedFile::is_lost`] reports it.
#![allow(unsafe_code)]

use std::fmt;
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::Arc;

use zerocopy::{FromBytes, Immutable};

use super::mapped_file::MappedFile;

/// Values that are read only, on the heap or in a mapped file.
pub struct Section<T> {
    start: NonNull<T>,
    len: usize,
    owner: Owner<T>,
}

/// What keeps the values in memory.
enum Owner<T> {
    Heap(Vec<T>),
    Mapped(Arc<MappedFile>),
}

// SAFETY: a section is only read, as a slice is, and its owner can be sent to another thread if the
// values can be shared.
unsafe impl<T: Send + Sync> Send for Section<T> {}
// SAFETY: as above.
unsafe impl<T: Send + Sync> Sync for Section<T> {}

impl<T: FromBytes + Immutable> Section<T> {
    /// `len` values at byte `offset` of a mapped file; `None` if they do not lie in it, or are not
    /// aligned there.
    ///
    /// The file must not change while it is mapped. A process that can change it has the rights of the process that
    /// maps it; the values are checked where they are used all the same, because a file that is
    /// truncated reads as zeros.
    pub fn mapped(file: &Arc<MappedFile>, offset: usize, len: usize) -> Option<Self> {
        let bytes = len.checked_mul(size_of::<T>())?;
        let slice = file.slice(offset, bytes)?;
        let start = NonNull::new(slice.ptr_guard().as_ptr().cast_mut().cast::<T>())?;
        start.is_aligned().then(|| Self {
            start,
            len,
            owner: Owner::Mapped(Arc::clone(file)),
        })
    }
}

impl<T> From<Vec<T>> for Section<T> {
    fn from(mut values: Vec<T>) -> Self {
        values.shrink_to_fit();
        Self {
            start: NonNull::from(values.as_mut_slice()).cast(),
            len: values.len(),
            owner: Owner::Heap(values),
        }
    }
}

impl<T> Default for Section<T> {
    fn default() -> Self {
        Vec::new().into()
    }
}

impl<T> Deref for Section<T> {
    type Target = [T];

    #[inline]
    fn deref(&self) -> &[T] {
        // SAFETY: `start` points at `len` values of the owner, a vector that is not changed or a
        // mapping of at least as many bytes, aligned, of which every pattern is a value. Both live
        // as long as `self`. A mapping keeps its addresses if its file is truncated.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T> fmt::Debug for Section<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = match &self.owner {
            Owner::Heap(values) => format!("{} on the heap", values.len()),
            Owner::Mapped(file) => format!("{} in a file of {} bytes", self.len, file.len()),
        };
        f.debug_tuple("Section").field(&place).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::io::mapped_file::Access;

    fn map(bytes: &[u8]) -> (std::fs::File, Arc<MappedFile>) {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        let mapped = MappedFile::new(&file, 0, bytes.len() as u64, Access::Read).unwrap();
        (file, Arc::new(mapped))
    }

    #[test]
    fn the_same_values_on_the_heap_and_mapped() {
        let values: Vec<u32> = (0..5000).collect();
        let bytes: Vec<u8> = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        let (_, file) = map(&bytes);
        let mapped = Section::<u32>::mapped(&file, 4, 4999).unwrap();
        drop(file);
        let heap = Section::from(values);
        assert_eq!(mapped[..], heap[1..]);
        assert!(Section::<u32>::default().is_empty());
    }

    #[test]
    fn ranges_outside_the_file_and_unaligned_ones_are_refused() {
        let (_, file) = map(&[0; 4096]);
        for (offset, len) in [
            (0, 513),
            (4096, 1),
            (4, 1),
            (usize::MAX, 1),
            (8, usize::MAX),
        ] {
            assert!(
                Section::<u64>::mapped(&file, offset, len).is_none(),
                "{offset} {len}"
            );
        }
        assert_eq!(Section::<u64>::mapped(&file, 8, 511).unwrap().len(), 511);
    }

    #[test]
    fn a_truncated_file_reads_as_zeros_and_is_lost() {
        let (file, mapped) = map(&[7; 8192]);
        let section = Section::<u8>::mapped(&mapped, 0, 8192).unwrap();
        assert_eq!(section[5000], 7);
        file.set_len(0).unwrap();
        assert_eq!((section[5000], mapped.is_lost()), (0, true));
    }
}
