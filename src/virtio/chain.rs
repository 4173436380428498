//! Descriptor chains (virtio 1.2, sections 2.7.5 and 2.7.6): from the number of a head descriptor
//! to the guest memory of the chain, as one readable and one writable list, and its status byte.
//!
//! Each descriptor is read once and checked. A chain that breaks a rule is followed to its end all
//! the same, for its structure only: the driver must find an error in the status byte, not what the
//! request before left there. The walk ends after as many descriptors as the table has, so a loop
//! ends in an error.
#![cfg_attr(
    not(test),
    warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)
)]

use vm_memory::{Bytes, GuestAddress, VolatileSlice};

use virtio_queue::desc::split::Descriptor;

use super::dirty_log::DirtyLog;
use super::memory::Memory;
use super::status::StatusByte;
use crate::io::scatter::Scatter;

/// Most descriptors in a chain that is served, direct and indirect together. The specification
/// stops at the queue's size; Linux drivers go a little beyond it with indirect tables.
pub const MAX_CHAIN: usize = 1024;

/// Most pieces of memory of a chain that is served: a descriptor that crosses memory regions has
/// several.
pub const MAX_PIECES: usize = 2 * MAX_CHAIN;

/// Most descriptors of a table that a chain can reach: `next` has 16 bits.
const MAX_TABLE: usize = 1 << 16;

const DESCRIPTOR: usize = size_of::<Descriptor>();

/// What is wrong with a chain.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum ChainError {
    /// `next` names a descriptor outside the table.
    #[error("descriptor {next} is outside its table of {table}")]
    Next {
        /// The number found.
        next: u16,
        /// Entries in the table.
        table: usize,
    },
    /// The chain does not end.
    #[error("the chain is a loop")]
    Loop,
    /// More descriptors than are served.
    #[error("the chain has more than {MAX_CHAIN} descriptors")]
    TooLong,
    /// More pieces of memory than are served.
    #[error("the chain has more than {MAX_PIECES} pieces of memory")]
    TooManyPieces,
    /// A descriptor names memory that the front-end does not share.
    #[error(
        "{len} bytes at guest address {addr:#x} are not in the shared memory: all guest memory must be shared (share=on)"
    )]
    Memory {
        /// Guest address.
        addr: u64,
        /// Bytes.
        len: u32,
    },
    /// The length of an indirect table is zero or no multiple of 16.
    #[error("indirect table at guest address {addr:#x} has {len} bytes, expected a multiple of 16")]
    Table {
        /// Guest address.
        addr: u64,
        /// Bytes.
        len: u32,
    },
    /// An indirect table inside an indirect table, or before the end of its chain, or without the
    /// feature.
    #[error("indirect descriptor where none is allowed")]
    Indirect,
    /// A readable descriptor after a writable one.
    #[error("readable descriptor after a writable one")]
    Order,
    /// No byte is writable.
    #[error("the chain has no writable byte for a status")]
    NoStatus,
}

/// A chain that cannot be served.
#[derive(Clone, Copy, Debug)]
pub struct BadChain<'m> {
    /// The first rule that the chain breaks.
    pub error: ChainError,
    /// Where the driver expects the status, if the chain's structure tells it.
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

/// The memory of one chain without its status byte. Kept and refilled by its owner, so that a walk
/// allocates nothing.
#[derive(Debug, Default)]
pub struct Chain<'m> {
    readable: Scatter<'m>,
    writable: Scatter<'m>,
    /// Guest ranges of the writable descriptors, while writes are logged.
    ranges: Vec<(GuestAddress, u32)>,
    /// Descriptors met so far.
    count: usize,
    /// The last descriptor with a byte, if it is writable: it ends in the status.
    last: Option<(GuestAddress, u32)>,
    /// The first rule broken. From then on no memory is collected.
    error: Option<ChainError>,
}

impl<'m> Chain<'m> {
    /// The bytes that the driver wrote for the device, in order.
    pub fn readable(&self) -> &Scatter<'m> {
        &self.readable
    }

    /// The bytes that the device may write, in order; the status byte is not among them.
    pub fn writable(&self) -> &Scatter<'m> {
        &self.writable
    }

    /// Pieces of memory that fit into the lists without another allocation.
    pub fn capacity(&self) -> usize {
        let (readable, writable) = (self.readable.capacity(), self.writable.capacity());
        readable.saturating_add(writable)
    }

    /// Collects the chain that starts at descriptor `head` of `table`, and takes its status byte
    /// off the writable memory. `indirect` tells whether the driver may use indirect tables.
    ///
    /// # Errors
    /// The chain breaks a rule of the specification, passes a limit, or names memory that is not
    /// shared.
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

    /// Records in `log` that the first `data` writable bytes were written.
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

    /// Follows the chain into its indirect table.
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

    /// Follows `next` within one table; returns an indirect descriptor that ends the walk.
    fn walk_table(
        &mut self,
        memory: &'m Memory,
        table: VolatileSlice<'m>,
        head: u16,
    ) -> Result<Option<Descriptor>, ChainError> {
        let entries = table.len() / DESCRIPTOR;
        let mut index = head;
        for _ in 0..entries.min(MAX_TABLE) {
            // One read of all sixteen bytes: no field can change between check and use.
            let descriptor: Descriptor = table
                .read_obj(usize::from(index).saturating_mul(DESCRIPTOR))
                .map_err(|_| ChainError::Next {
                    next: index,
                    table: entries,
                })?;
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

    /// Adds the memory of `descriptor`, unless the chain is bad already.
    fn add(&mut self, memory: &'m Memory, descriptor: &Descriptor) {
        let (addr, len) = (descriptor.addr(), descriptor.len());
        if len > 0 {
            self.last = descriptor.is_write_only().then_some((addr, len));
        }
        if self.error.is_none() {
            self.error = self.collect(memory, descriptor).err();
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
        if !memory.slices(addr, len as usize, |piece| list.push(piece)) {
            return Err(ChainError::Memory { addr: addr.0, len });
        }
        let (readable, writable) = (self.readable.pieces(), self.writable.pieces());
        if readable.len().saturating_add(writable.len()) > MAX_PIECES {
            return Err(ChainError::TooManyPieces);
        }
        Ok(())
    }

    /// Takes the last byte off the writable memory of a good chain.
    fn split_status(&mut self) -> Option<StatusByte<'m>> {
        let last = self.writable.pieces().last()?;
        let byte = last.subslice(last.len().checked_sub(1)?, 1).ok()?;
        let address = self.status_address()?;
        self.writable.truncate_by(1);
        Some(StatusByte::new(byte, address))
    }

    /// A chain whose end was found, but that breaks a rule.
    #[cold]
    fn bad(&self, memory: &'m Memory, error: ChainError) -> BadChain<'m> {
        let status = self.status_address().and_then(|address| {
            let byte = memory.slice(address, 1)?;
            Some(StatusByte::new(byte, address))
        });
        BadChain { error, status }
    }

    /// The chain's last byte, if it is writable.
    fn status_address(&self) -> Option<GuestAddress> {
        let (addr, len) = self.last?;
        let offset = u64::from(len.checked_sub(1)?);
        addr.0.checked_add(offset).map(GuestAddress)
    }
}
