//! Guest memory: the regions that the front-end shares, by guest address.
//!
//! A [`Memory`] is immutable. Adding or removing a region returns a new one; the old one keeps its mappings
//! while it is in use. Files are closed once mapped.
#![cfg_attr(
    not(test),
    warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)
)]

use std::fs::File;
use std::sync::Arc;

use vm_memory::{GuestAddress, VolatileSlice};

use super::dirty_log::DirtyLog;
use crate::io::mapped_file::{Access, MapError, MappedFile};

/// Error of adding or removing a memory region.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The region exceeds the address space.
    #[error(
        "memory region at guest address {guest:#x}, {len} bytes, passes the end of the address space"
    )]
    Overflow {
        /// Guest address of the region.
        guest: u64,
        /// Length of the region in bytes.
        len: u64,
    },
    /// The region overlaps another one.
    #[error("memory region at guest address {guest:#x}, {len} bytes, overlaps another")]
    Overlap {
        /// Guest address of the region.
        guest: u64,
        /// Length of the region in bytes.
        len: u64,
    },
    /// The file of the region cannot be mapped.
    #[error("cannot map the memory region at guest address {guest:#x}, {len} bytes")]
    Map {
        /// Guest address of the region.
        guest: u64,
        /// Length of the region in bytes.
        len: u64,
        /// Reason.
        source: MapError,
    },
    /// The region to remove does not exist.
    #[error("no memory region of {len} bytes at guest address {guest:#x} to remove")]
    Unknown {
        /// Guest address of the region.
        guest: u64,
        /// Length of the region in bytes.
        len: u64,
    },
}

/// Memory region as the front-end describes it (vhost-user, "Memory region description").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionInfo {
    /// Guest physical address of the first byte.
    pub guest: u64,
    /// Length in bytes.
    pub len: u64,
    /// Address of the first byte in the address space of the front-end, which ring addresses refer to.
    pub user: u64,
    /// Offset of the first byte in the file.
    pub file_offset: u64,
}

#[derive(Clone, Debug)]
struct Region {
    info: RegionInfo,
    mapping: Arc<MappedFile>,
}

impl Region {
    fn map(info: RegionInfo, file: &File) -> Result<Self, MemoryError> {
        let RegionInfo {
            guest,
            len,
            user,
            file_offset,
        } = info;
        if guest.checked_add(len).is_none() || user.checked_add(len).is_none() {
            return Err(MemoryError::Overflow { guest, len });
        }
        let mapping = MappedFile::new(file, file_offset, len, Access::ReadWrite)
            .map_err(|source| MemoryError::Map { guest, len, source })?;
        Ok(Self {
            info,
            mapping: Arc::new(mapping),
        })
    }

    /// First bytes of `[addr, addr + len)`, as many as lie in this region.
    fn slice(&self, addr: u64, len: usize) -> Option<VolatileSlice<'_>> {
        let offset = usize::try_from(addr.checked_sub(self.info.guest)?).ok()?;
        let left = self.mapping.len().checked_sub(offset)?;
        self.mapping.slice(offset, len.min(left))
    }
}

/// Memory regions of a guest, sorted by guest address, and the dirty log of writes to them.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    regions: Vec<Region>,
    log: Option<Arc<DirtyLog>>,
}

impl Memory {
    /// Returns this memory with one more region.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Overflow`], [`MemoryError::Overlap`] or [`MemoryError::Map`].
    pub fn with_region(&self, info: RegionInfo, file: File) -> Result<Memory, MemoryError> {
        let mut memory = self.clone();
        let at = memory
            .regions
            .partition_point(|other| other.info.guest < info.guest);
        let (below, above) = memory.regions.split_at(at);
        let overlaps =
            |low: &RegionInfo, high: &RegionInfo| low.guest.saturating_add(low.len) > high.guest;
        if below.last().is_some_and(|low| overlaps(&low.info, &info))
            || above
                .first()
                .is_some_and(|high| overlaps(&info, &high.info))
        {
            return Err(MemoryError::Overlap {
                guest: info.guest,
                len: info.len,
            });
        }
        let region = Region::map(info, &file)?;
        memory.regions.insert(at, region);
        Ok(memory)
    }

    /// Returns this memory without the region of this guest address, length and front-end address.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Unknown`] if there is no such region.
    pub fn without_region(&self, guest: u64, len: u64, user: u64) -> Result<Memory, MemoryError> {
        let mut memory = self.clone();
        let same = |region: &Region| {
            (region.info.guest, region.info.len, region.info.user) == (guest, len, user)
        };
        match memory.regions.iter().position(same) {
            Some(at) => {
                memory.regions.remove(at);
                Ok(memory)
            }
            None => Err(MemoryError::Unknown { guest, len }),
        }
    }

    /// Returns this memory with writes marked in `log`, if there is one.
    pub fn with_log(&self, log: Option<Arc<DirtyLog>>) -> Memory {
        Memory {
            regions: self.regions.clone(),
            log,
        }
    }

    /// Whether the front-end truncated a file: bytes read since then may not be the guest's.
    pub fn is_lost(&self) -> bool {
        self.regions.iter().any(|region| region.mapping.is_lost())
    }

    /// Number of regions.
    pub fn region_count(&self) -> usize {
        self.regions.len()
    }

    /// Guest address of address `user` of the front-end.
    pub fn user_to_guest(&self, user: u64) -> Option<GuestAddress> {
        self.regions.iter().find_map(|region| {
            let offset = user.checked_sub(region.info.user)?;
            let inside = Some(offset).filter(|offset| *offset < region.info.len)?;
            region.info.guest.checked_add(inside).map(GuestAddress)
        })
    }

    /// First bytes of `[addr, addr + len)`, as many as lie in one region.
    fn piece(&self, addr: u64, len: usize) -> Option<VolatileSlice<'_>> {
        let region = match self.regions.as_slice() {
            // Most guests have one or two, and a comparison costs less than a search.
            [first] => first,
            [first, second] if addr < second.info.guest => first,
            regions => {
                let after = regions.partition_point(|region| region.info.guest <= addr);
                regions.get(after.checked_sub(1)?)?
            }
        };
        let piece = region.slice(addr, len)?;
        (!piece.is_empty()).then_some(piece)
    }

    /// The `len` bytes at `addr`, if they lie in one region.
    pub fn slice(&self, addr: GuestAddress, len: usize) -> Option<VolatileSlice<'_>> {
        self.piece(addr.0, len).filter(|piece| piece.len() == len)
    }

    /// Calls `each` with the pieces of `[addr, addr + len)`, one for each region. Returns whether all of it
    /// is guest memory; if not, `each` may have been called with some pieces.
    #[must_use]
    #[inline(never)]
    pub fn slices<'m>(
        &'m self,
        addr: GuestAddress,
        len: usize,
        mut each: impl FnMut(VolatileSlice<'m>),
    ) -> bool {
        let (mut at, mut left) = (addr.0, len);
        while left > 0 {
            let Some(piece) = self.piece(at, left) else {
                return false;
            };
            each(piece);
            left = left.saturating_sub(piece.len());
            match at.checked_add(piece.len() as u64) {
                Some(next) => at = next,
                None => return left == 0,
            }
        }
        true
    }

    /// Dirty log, while a migration runs.
    pub fn log(&self) -> Option<&DirtyLog> {
        self.log.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memfd(len: u64) -> File {
        let fd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(len).unwrap();
        file
    }

    fn region(guest: u64, len: u64) -> RegionInfo {
        RegionInfo {
            guest,
            len,
            user: guest + 0x7000_0000_0000,
            file_offset: 0,
        }
    }

    #[test]
    fn slices_cross_neighbours_and_stop_at_holes() {
        let memory = Memory::default()
            .with_region(region(0x3000, 0x1000), memfd(0x1000))
            .and_then(|memory| memory.with_region(region(0x1000, 0x2000), memfd(0x2000)))
            .unwrap();
        let mut lens = Vec::new();
        assert!(memory.slices(GuestAddress(0x2ff0), 0x20, |piece| lens.push(piece.len())));
        assert_eq!(lens, [0x10, 0x10]);
        assert!(memory.slice(GuestAddress(0x2ff0), 0x20).is_none());
        assert!(memory.slice(GuestAddress(0x3000), 0x1000).is_some());
        for (addr, len) in [
            (0xfff, 1),
            (0x4000, 1),
            (0x3fff, 2),
            (u64::MAX, 2),
            (0x1000, 1 << 40),
        ] {
            assert!(
                !memory.slices(GuestAddress(addr), len, |_| ()),
                "{addr:#x}+{len}"
            );
        }
        assert_eq!(
            memory.user_to_guest(0x7000_0000_3001),
            Some(GuestAddress(0x3001))
        );
        assert_eq!(memory.user_to_guest(0x7000_0000_4000), None);
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let memory = Memory::default()
            .with_region(region(0x2000, 0x2000), memfd(0x2000))
            .unwrap();
        for guest in [0x1000, 0x2000, 0x3000] {
            let error = memory
                .with_region(region(guest, 0x2000), memfd(0x2000))
                .unwrap_err();
            assert!(matches!(error, MemoryError::Overlap { .. }), "{error}");
        }
        let short = Memory::default().with_region(region(0, 0x2000), memfd(0x1000));
        assert!(matches!(
            short,
            Err(MemoryError::Map {
                source: MapError::Short { .. },
                ..
            })
        ));
        let far = RegionInfo {
            guest: u64::MAX - 1,
            len: 0x1000,
            user: 0,
            file_offset: 0,
        };
        let far = Memory::default().with_region(far, memfd(0x1000));
        assert!(matches!(far, Err(MemoryError::Overflow { .. })));
        assert!(
            memory
                .without_region(0x2000, 0x1000, 0x7000_0000_2000)
                .is_err()
        );
        let removed = memory
            .without_region(0x2000, 0x2000, 0x7000_0000_2000)
            .unwrap();
        assert!(removed.slice(GuestAddress(0x2000), 1).is_none());
        assert!(
            memory.slice(GuestAddress(0x2000), 1).is_some(),
            "the old view is unchanged"
        );
    }
}
