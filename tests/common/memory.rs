//! Guest memory as a VMM shares it: memfds mapped here and, by descriptor, in the back-end.
//!
//! Guest addresses, offsets in the files and addresses of this process all differ, so that a
//! back-end which takes one for another fails.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::VhostUserMemoryRegionInfo;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryRegion, GuestRegionMmap, MmapRegion, VolatileSlice,
};

/// One piece of guest memory in a memfd of its own.
#[derive(Debug)]
pub struct Region {
    mapping: GuestRegionMmap,
    file: Arc<File>,
    file_offset: u64,
    allocated: AtomicU64,
}

impl Region {
    /// Maps `len` bytes at guest address `base`, from `file_offset` on in a new memfd.
    pub fn new(base: u64, len: u64, file_offset: u64) -> Arc<Self> {
        let fd = memfd_create("guest-memory", MemfdFlags::CLOEXEC).expect("memfd");
        ftruncate(&fd, file_offset + len).expect("size of memfd");
        let file = Arc::new(File::from(fd));
        let range = FileOffset::from_arc(Arc::clone(&file), file_offset);
        let mapping = MmapRegion::from_file(range, len as usize).expect("mmap");
        Arc::new(Self {
            mapping: GuestRegionMmap::new(mapping, GuestAddress(base)).expect("guest range"),
            file,
            file_offset,
            allocated: AtomicU64::new(0),
        })
    }

    /// First guest address.
    pub fn base(&self) -> u64 {
        self.mapping.start_addr().0
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.mapping.len()
    }

    /// First guest address past the end.
    pub fn end(&self) -> u64 {
        self.base() + self.size()
    }

    /// The memfd, for a front-end that takes memory away.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Whether `address` lies in here.
    pub fn contains(&self, address: u64) -> bool {
        (self.base()..self.end()).contains(&address)
    }

    /// All of it.
    pub fn all(&self) -> VolatileSlice<'_> {
        self.mapping.as_volatile_slice().expect("mapped region")
    }

    /// `len` bytes at guest address `address`, which must lie in here.
    pub fn slice(&self, address: u64, len: usize) -> VolatileSlice<'_> {
        let offset = (address - self.base()) as usize;
        self.all().subslice(offset, len).expect("inside the region")
    }

    /// Guest address of `len` fresh bytes; they are never given out again.
    pub fn alloc(&self, len: u64, align: u64) -> u64 {
        let place = |allocated: u64| {
            let start = (self.base() + allocated).next_multiple_of(align);
            (start + len <= self.end()).then_some(start)
        };
        let next = |allocated| place(allocated).map(|start| start + len - self.base());
        let before = self
            .allocated
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, next)
            .expect("region has room");
        place(before).expect("region has room")
    }

    /// The address this process sees `address` at: what SET_VRING_ADDR speaks of.
    pub fn user_address(&self, address: u64) -> u64 {
        self.info().userspace_addr + (address - self.base())
    }

    /// The region as SET_MEM_TABLE and ADD_MEM_REG describe it.
    pub fn info(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: self.base(),
            memory_size: self.size(),
            userspace_addr: self.all().ptr_guard().as_ptr().addr() as u64,
            mmap_offset: self.file_offset,
            mmap_handle: self.file.as_raw_fd(),
        }
    }
}

/// The regions of one guest.
#[derive(Clone, Debug)]
pub struct Memory {
    /// The regions, in any order.
    pub regions: Vec<Arc<Region>>,
}

/// Bytes of each region of [`Memory::typical`].
pub const REGION: u64 = 16 << 20;

impl Memory {
    /// Four regions: a low one, two that touch without a hole, and one above 4 GiB.
    pub fn typical() -> Self {
        Self {
            regions: vec![
                Region::new(0x10_0000, REGION, 0x3000),
                Region::new(0x4000_0000, REGION, 0),
                Region::new(0x4000_0000 + REGION, REGION, 0x1_0000),
                Region::new(0x1_0000_0000, REGION, 0),
            ],
        }
    }

    /// An address no region holds.
    pub const HOLE: u64 = 0x2000_0000;

    /// The region that holds `address`.
    pub fn region(&self, address: u64) -> &Arc<Region> {
        let holds = |region: &&Arc<Region>| region.contains(address);
        self.regions.iter().find(holds).expect("guest address")
    }

    /// Calls `each` with the pieces that make up `len` bytes at `address`.
    fn pieces(&self, mut address: u64, mut len: usize, mut each: impl FnMut(VolatileSlice)) {
        while len > 0 {
            let region = self.region(address);
            let part = len.min((region.end() - address) as usize);
            each(region.slice(address, part));
            address += part as u64;
            len -= part;
        }
    }

    /// Copies `bytes` to `address`; regions that touch are crossed.
    pub fn write(&self, address: u64, mut bytes: &[u8]) {
        self.pieces(address, bytes.len(), |piece| {
            let (now, later) = bytes.split_at(piece.len());
            piece.copy_from(now);
            bytes = later;
        });
    }

    /// `len` bytes from `address`; regions that touch are crossed.
    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let mut done = 0;
        self.pieces(address, len, |piece| {
            done += piece.copy_to(&mut bytes[done..done + piece.len()]);
        });
        bytes
    }
}
