//! Descriptor chains (virtio 1.2, sections 2.7.5 and 2.7.6). A walk collects the guest memory of a chain in
//! one readable and one writable list, and finds its status byte.
//!
//! Each descriptor is read once and checked. The walk of a chain that breaks a rule continues to its end,
//! to find the status byte: the driver must find an error there, not the status of an earlier request. A
//! walk visits at most as many descriptors as the table has, so that a loop is an error.
#![cfg_attr(
    not(test),
    warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)
)]

use vm_memory::{GuestAddress, VolatileMemory, VolatileSlice};

use virtio_queue::desc::split::Descriptor;

use super::dirty_log::DirtyLog;
use super::memory::Memory;
use super::status::StatusByte;
use crate::io::scatter::Scatter;

/// Most descriptors of a chain that is served, direct and indirect together. The specification allows
/// the queue's size; Linux drivers exceed it slightly with indirect tables.
pub const MAX_CHAIN: usize = 1024;

/// Most pieces of guest memory of a chain that is served. A descriptor that crosses memory regions has
/// several pieces.
pub const MAX_PIECES: usize = 2 * MAX_CHAIN;

/// Most descriptors of a table that `next`, which has 16 bits, can name.
const MAX_TABLE: usize = 1 << 16;

const DESCRIPTOR: usize = size_of::<Descriptor>();

/// Rule that a chain breaks.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum ChainError {
    /// `next` names a descriptor outside the table.
    #[error("descriptor {next} is outside its table of {table}")]
    Next {
        /// Number found.
        next: u16,
        /// Number of entries of the table.
        table: usize,
    },
    /// The chain has no end.
    #[error("the chain is a loop")]
    Loop,
    /// The chain has too many descriptors.
    #[error("the chain has more than {MAX_CHAIN} descriptors")]
    TooLong,
    /// The chain has too many pieces of memory.
    #[error("the chain has more than {MAX_PIECES} pieces of memory")]
    TooManyPieces,
    /// A descriptor names guest memory that the front-end does not share.
    #[error(
        "{len} bytes at guest address {addr:#x} are not in the shared memory: all guest memory must be shared (share=on)"
    )]
    Memory {
        /// Guest address.
        addr: u64,
        /// Length in bytes.
        len: u32,
    },
    /// The length of an indirect table is zero or not a multiple of 16.
    #[error("indirect table at guest address {addr:#x} has {len} bytes, expected a multiple of 16")]
    Table {
        /// Guest address.
        addr: u64,
        /// Length in bytes.
        len: u32,
    },
    /// An indirect descriptor lies in an indirect table, is not the last one of its table, or comes without
    /// the feature.
    #[error("indirect descriptor where none is allowed")]
    Indirect,
    /// A readable descriptor follows a writable one.
    #[error("readable descriptor after a writable one")]
    Order,
    /// The chain has no writable byte.
    #[error("the chain has no writable byte for a status")]
    NoStatus,
}

/// A chain that cannot be served.
#[derive(Clone, Copy, Debug)]
pub struct BadChain<'m> {
    /// First rule that the chain breaks.
    pub error: ChainError,
    /// Status byte of the chain, if the walk found it.
    pub status: Option<StatusByte<'m>>,
}

impl From<ChainError> for BadChain<'_> {
    fn from(error: ChainError) -> Self {
        Self {
            error,
            status: None,
        }
    }
}

/// Guest memory of one chain without its status byte. Its lists keep their memory when it is used for the
/// next chain, so that a walk allocates nothing.
#[derive(Debug, Default)]
pub struct Chain<'m> {
    readable: Scatter<'m>,
    writable: Scatter<'m>,
    /// Guest ranges of the writable descriptors, if writes are logged.
    ranges: Vec<(GuestAddress, u32)>,
    /// Number of descriptors so far.
    count: usize,
    /// Range of the last descriptor that is not empty, if it is writable: it ends in the status byte.
    last: Option<(GuestAddress, u32)>,
    /// First rule that the chain breaks. No more memory is collected then.
    error: Option<ChainError>,
}

impl<'m> Chain<'m> {
    /// Memory that the device may read, in order.
    pub fn readable(&self) -> &Scatter<'m> {
        &self.readable
    }

    /// Memory that the device may write, in order, without the status byte.
    pub fn writable(&self) -> &Scatter<'m> {
        &self.writable
    }

    /// Number of pieces that the lists can hold without another allocation.
    pub fn capacity(&self) -> usize {
        let (readable, writable) = (self.readable.capacity(), self.writable.capacity());
        readable.saturating_add(writable)
    }

    /// Walks the chain that starts at descriptor `head` of `table`, and returns its status byte.
    /// `indirect`: whether the driver may use indirect tables.
    ///
    /// # Errors
    ///
    /// [`BadChain`] if the chain breaks a rule, exceeds a limit, or names memory that is not shared.
    pub fn walk(
        &mut self,
        memory: &'m Memory,
        table: VolatileSlice<'m>,
        head: u16,
        indirect: bool,
    ) -> Result<StatusByte<'m>, BadChain<'m>> {
        self.clear();
        if let Some(descriptor) = self.walk_table(memory, table, head)? {
            self.walk_indirect(memory, &descriptor, indirect)?;
        }
        match self.error {
            Some(error) => Err(self.bad(memory, error)),
            None => self.split_status().ok_or(ChainError::NoStatus.into()),
        }
    }

    /// Marks the first `data` writable bytes as written in `log`.
    pub fn mark_written(&self, log: &DirtyLog, data: u64) {
        let mut left = data;
        for (addr, len) in &self.ranges {
            let part = left.min(u64::from(*len));
            log.mark(*addr, part);
            left = left.saturating_sub(part);
        }
    }

    fn clear(&mut self) {
        self.readable.clear();
        self.writable.clear();
        self.ranges.clear();
        (self.count, self.last, self.error) = (0, None, None);
    }

    /// Walks the indirect table of the chain.
    fn walk_indirect(
        &mut self,
        memory: &'m Memory,
        descriptor: &Descriptor,
        allowed: bool,
    ) -> Result<(), ChainError> {
        // Driver requirements of 2.7.5.3.1: negotiated, one level, and the end of its chain.
        if !allowed || descriptor.has_next() {
            return Err(ChainError::Indirect);
        }
        let (addr, len) = (descriptor.addr(), descriptor.len());
        let bytes = len as usize;
        if bytes == 0 || !bytes.is_multiple_of(DESCRIPTOR) {
            return Err(ChainError::Table { addr: addr.0, len });
        }
        let table = memory
            .slice(addr, bytes)
            .ok_or(ChainError::Memory { addr: addr.0, len })?;
        match self.walk_table(memory, table, 0)? {
            Some(_) => Err(ChainError::Indirect),
            None => Ok(()),
        }
    }

    /// Walks one table; returns the indirect descriptor that ends it, if there is one.
    fn walk_table(
        &mut self,
        memory: &'m Memory,
        table: VolatileSlice<'m>,
        head: u16,
    ) -> Result<Option<Descriptor>, ChainError> {
        let entries = table.len() / DESCRIPTOR;
        let mut index = head;
        for _ in 0..entries.min(MAX_TABLE) {
            // One read of all sixteen bytes, so that no field changes between check and use.
            let at = usize::from(index).saturating_mul(DESCRIPTOR);
            let Ok(place) = table.get_ref::<Descriptor>(at) else {
                return Err(ChainError::Next {
                    next: index,
                    table: entries,
                });
            };
            let descriptor = place.load();
            if descriptor.refers_to_indirect_table() {
                return Ok(Some(descriptor));
            }
            self.add(memory, &descriptor);
            if !descriptor.has_next() {
                return Ok(None);
            }
            index = descriptor.next();
        }
        Err(ChainError::Loop)
    }

    /// Adds the memory of `descriptor`, unless the chain broke a rule before.
    fn add(&mut self, memory: &'m Memory, descriptor: &Descriptor) {
        let (addr, len) = (descriptor.addr(), descriptor.len());
        if len > 0 {
            self.last = descriptor.is_write_only().then_some((addr, len));
        }
        if self.error.is_none()
            && let Err(error) = self.collect(memory, descriptor)
        {
            self.error = Some(error);
        }
    }

    fn collect(&mut self, memory: &'m Memory, descriptor: &Descriptor) -> Result<(), ChainError> {
        let (addr, len) = (descriptor.addr(), descriptor.len());
        self.count = self.count.saturating_add(1);
        if self.count > MAX_CHAIN {
            return Err(ChainError::TooLong);
        }
        let list = if descriptor.is_write_only() {
            if memory.log().is_some() {
                self.ranges.push((addr, len));
            }
            &mut self.writable
        } else if self.writable.is_empty() {
            &mut self.readable
        } else {
            return Err(ChainError::Order);
        };
        match memory.slice(addr, len as usize) {
            // Almost all descriptors lie in one region.
            Some(piece) => list.push(piece),
            None if memory.slices(addr, len as usize, |piece| list.push(piece)) => {}
            None => return Err(ChainError::Memory { addr: addr.0, len }),
        }
        let (readable, writable) = (self.readable.pieces(), self.writable.pieces());
        if readable.len().saturating_add(writable.len()) > MAX_PIECES {
            return Err(ChainError::TooManyPieces);
        }
        Ok(())
    }

    /// Splits the status byte off the writable memory of a good chain.
    fn split_status(&mut self) -> Option<StatusByte<'m>> {
        let last = self.writable.pieces().last()?;
        let byte = last.subslice(last.len().checked_sub(1)?, 1).ok()?;
        let address = self.status_address()?;
        self.writable.truncate_by(1);
        Some(StatusByte::new(byte, address))
    }

    /// A chain that breaks a rule, after a walk to its end.
    #[cold]
    fn bad(&self, memory: &'m Memory, error: ChainError) -> BadChain<'m> {
        let status = self.status_address().and_then(|address| {
            let byte = memory.slice(address, 1)?;
            Some(StatusByte::new(byte, address))
        });
        BadChain { error, status }
    }

    /// Guest address of the last byte of the chain, if it is writable.
    fn status_address(&self) -> Option<GuestAddress> {
        let (addr, len) = self.last?;
        let offset = u64::from(len.checked_sub(1)?);
        addr.0.checked_add(offset).map(GuestAddress)
    }
}
