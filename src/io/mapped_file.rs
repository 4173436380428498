//! Shared memory mappings of files that may be truncated while they are mapped.
#![allow(unsafe_code)]

use std::fs::File;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::FileType;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise};
use vm_memory::VolatileSlice;

use crate::io::file_system;
use crate::io::sigbus::Watch;

/// A file range cannot be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The range is empty, or ends after the last address.
    #[error(
        "cannot map {len} bytes at offset {offset}: the range is empty or ends past the last address"
    )]
    Range {
        /// Where the range starts in its file, in bytes.
        offset: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// The file ends before the range does.
    #[error("file has {actual} bytes; the range needs {needed}")]
    Short {
        /// Bytes the file must have.
        needed: u64,
        /// Bytes it has.
        actual: u64,
    },
    /// The size of the file cannot be read.
    #[error("cannot get the size of the file")]
    Stat(#[source] std::io::Error),
    /// `mmap(2)` failed.
    #[error("cannot map the file")]
    Map(#[source] std::io::Error),
    /// RLIMIT_AS leaves too little address space for the range.
    #[error(
        "cannot map {len} bytes: RLIMIT_AS (ulimit -v) leaves {left} bytes beside the needs of the queues; \
         raise the limit"
    )]
    AddressSpace {
        /// Length of the range in bytes.
        len: u64,
        /// Bytes of address space that are left.
        left: u64,
    },
    /// The table of watched mappings is full.
    #[error("too many mappings: the table of ranges protected from SIGBUS is full")]
    Full,
}

/// Bytes of address space that new mappings may take.
static ADDRESS_SPACE_LEFT: AtomicU64 = AtomicU64::new(u64::MAX);

/// Limits new mappings to `bytes` of address space in total, so that RLIMIT_AS leaves memory for everything
/// else. A mapping that is dropped gives its bytes back.
pub fn limit_address_space(bytes: u64) {
    ADDRESS_SPACE_LEFT.store(bytes, Ordering::Relaxed);
}

/// Bytes of address space of one mapping, given back when dropped.
#[derive(Debug)]
struct AddressSpace(u64);

impl AddressSpace {
    fn take(len: u64) -> Result<Self, MapError> {
        let taken = ADDRESS_SPACE_LEFT.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
            left.checked_sub(len)
        });
        match taken {
            Ok(_) => Ok(Self(len)),
            Err(left) => Err(MapError::AddressSpace { len, left }),
        }
    }
}

impl Drop for AddressSpace {
    fn drop(&mut self) {
        ADDRESS_SPACE_LEFT.fetch_add(self.0, Ordering::Relaxed);
    }
}

/// Access that a mapping allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading only.
    Read,
    /// Reading and writing; all mappings of the file see the writes.
    ReadWrite,
}

/// A shared mapping of a file range. It does not keep the file open.
#[derive(Debug)]
pub struct MappedFile {
    /// Dropped before the range is unmapped, in [`MappedFile::drop`]. `None` only in `new` and `drop`.
    watch: Option<Watch>,
    start: NonNull<u8>,
    len: usize,
    access: Access,
    _address_space: AddressSpace,
}

// SAFETY: a mapping belongs to the process, not to a thread. Its bytes are accessed only through
// volatile slices, which allow concurrent accesses.
unsafe impl Send for MappedFile {}
// SAFETY: as above.
unsafe impl Sync for MappedFile {}

impl MappedFile {
    /// Maps `len` bytes at `offset` of `file`, which must have them now.
    ///
    /// # Errors
    /// Any [`MapError`].
    pub fn new(file: &File, offset: u64, len: u64, access: Access) -> Result<MappedFile, MapError> {
        let absurd = MapError::Range { offset, len };
        let (Some(needed), Ok(size)) = (offset.checked_add(len), usize::try_from(len)) else {
            return Err(absurd);
        };
        if size == 0 || isize::try_from(size).is_err() {
            return Err(absurd);
        }
        // A device has no length, and the file system of its file may not answer (`file_system`).
        let mode = file_system::mode(file).map_err(MapError::Stat)?;
        if FileType::from_raw_mode(mode) == FileType::RegularFile {
            let actual = file.metadata().map_err(MapError::Stat)?.len();
            if actual < needed {
                return Err(MapError::Short { needed, actual });
            }
        }
        let address_space = AddressSpace::take(len)?;
        let protection = match access {
            Access::Read => ProtFlags::READ,
            Access::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
        };
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: the kernel chooses a free address, so no existing mapping is replaced.
        let start = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), size, protection, flags, file, offset)
        };
        let start = start.map_err(|errno| MapError::Map(errno.into()))?;
        let start = NonNull::new(start.cast()).ok_or(absurd)?;
        // From here on, dropping `mapping` unmaps the range.
        let mut mapping = MappedFile {
            watch: None,
            start,
            len: size,
            access,
            _address_space: address_space,
        };
        // Guest memory must not get into a core dump of the daemon, as far as the kernel follows the advice.
        // SAFETY: the range was just mapped, and the advice does not change its bytes.
        let _ = unsafe { madvise(mapping.start.as_ptr().cast(), size, Advice::LinuxDontDump) };
        mapping.watch = Some(Watch::new(start.as_ptr(), size).ok_or(MapError::Full)?);
        Ok(mapping)
    }

    /// Length in bytes.
    #[expect(
        clippy::len_without_is_empty,
        reason = "an empty range cannot be mapped"
    )]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns `len` bytes at `offset`; `None` if the mapping ends before.
    pub fn slice(&self, offset: usize, len: usize) -> Option<VolatileSlice<'_>> {
        if offset.checked_add(len)? > self.len {
            return None;
        }
        // SAFETY: the range lies in the mapping, and the slice borrows from `self`, which keeps it mapped.
        // If the file is truncated, the addresses stay accessible (`sigbus`).
        Some(unsafe { VolatileSlice::new(self.start.as_ptr().add(offset), len) })
    }

    /// Returns the bytes as 64-bit cells; none if the mapping allows no writing. Other processes may change them.
    pub fn cells(&self) -> &[AtomicU64] {
        let count = match self.access {
            Access::Read => 0,
            Access::ReadWrite => self.len / size_of::<AtomicU64>(),
        };
        // SAFETY: the mapping begins at a page boundary, has room for `count` cells, of which any bytes are valid ones,
        // allows writing, and lives as long as `self`. It is accessed only by atomics and volatile slices. If the file
        // is truncated, the addresses stay accessible (`sigbus`).
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), count) }
    }

    /// Whether a page that was accessed was missing from the file: what was read is not its content.
    pub fn is_lost(&self) -> bool {
        self.watch.as_ref().is_some_and(Watch::is_lost)
    }
}

impl Drop for MappedFile {
    fn drop(&mut self) {
        self.watch = None;
        // SAFETY: `new` mapped the range, only this function unmaps it, and all slices of it borrow from
        // `self`.
        let unmapped = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
        debug_assert!(unmapped.is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_truncated_file_is_noticed_and_affects_no_other_mapping() {
        let (file, other) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        file.set_len(16384).unwrap();
        other.set_len(4096).unwrap();
        let mapping = MappedFile::new(&file, 4096, 12288, Access::ReadWrite).unwrap();
        let healthy = MappedFile::new(&other, 0, 4096, Access::Read).unwrap();
        mapping.slice(0, 1).unwrap().copy_from(&[7u8]);
        assert!(!mapping.is_lost());
        file.set_len(4096).unwrap();
        let mut byte = [1u8];
        mapping.slice(8192, 1).unwrap().copy_to(&mut byte[..]);
        assert_eq!(byte, [0]);
        assert!(mapping.is_lost());
        mapping.slice(0, 1).unwrap().copy_from(&[7u8]);
        assert!(!healthy.is_lost());
    }

    #[test]
    fn core_dumps_leave_it_out() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let mapping = MappedFile::new(&file, 0, 4096, Access::ReadWrite).unwrap();
        let start = format!("{:x}-", mapping.start.as_ptr().addr());
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let own = maps.lines().skip_while(|line| !line.starts_with(&start));
        let flags = own.skip(1).find(|line| line.starts_with("VmFlags:"));
        assert!(
            flags.unwrap().split(' ').any(|flag| flag == "dd"),
            "{flags:?}"
        );
    }

    #[test]
    fn refuses_what_the_file_does_not_hold() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        for (offset, len) in [
            (0, 0),
            (0, 8193),
            (4096, 4097),
            (u64::MAX, 1),
            (0, u64::MAX),
        ] {
            assert!(
                MappedFile::new(&file, offset, len, Access::Read).is_err(),
                "{offset}+{len}"
            );
        }
        assert!(MappedFile::new(&file, 4096, 4096, Access::Read).is_ok());
    }
}
