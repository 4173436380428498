//! Descriptor chains (virtio 1.2, sections 2.7.5 and 2.7.6): from a head's number to the memory
//! the driver lends us, in two lists, what we may read and what we may write.
//!
//! Each descriptor is read once and checked; the walk is bounded, so that a loop ends in an error.

use vm_memory::{Bytes, GuestAddress, VolatileSlice};

use virtio_queue::desc::split::Descriptor;

use super::dirty_log::DirtyLog;
use super::memory::Memory;
use crate::io::scatter::Scatter;

/// Most descriptors in one chain, direct and indirect together. The specification stops at the
/// queue's size; Linux drivers go a little beyond it with indirect tables.
pub const MAX_CHAIN: usize = 1024;

const DESCRIPTOR: usize = size_of::<Descriptor>();

/// Most pieces of memory of one chain: a descriptor that crosses memory regions has several.
pub const MAX_PIECES: usize = 2 * MAX_CHAIN;

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
    /// More descriptors than a chain may have, or a loop.
    #[error("chain of more than {MAX_CHAIN} descriptors, or a loop")]
    TooLong,
    /// More pieces of memory than a chain may have.
    #[error("chain of more than {MAX_PIECES} pieces of memory")]
    TooManyPieces,
    /// A descriptor names memory the guest does not have.
    #[error("{len} bytes at guest {addr:#x} are not guest memory")]
    Memory {
        /// Guest address.
        addr: u64,
        /// Bytes.
        len: u32,
    },
    /// An indirect table whose length is no multiple of 16, or zero, or past the bound.
    #[error("indirect table of {len} bytes at guest {addr:#x}")]
    Table {
        /// Guest address.
        addr: u64,
        /// Bytes.
        len: u32,
    },
    /// An indirect table inside an indirect table, or one that goes on with `next`, or one
    /// that the driver did not negotiate.
    #[error("indirect descriptor where none is allowed")]
    Indirect,
    /// A readable descriptor after a writable one.
    #[error("readable descriptor after a writable one")]
    Order,
}

/// The memory of one chain. Kept and refilled by its owner, so that a walk allocates nothing.
#[derive(Debug, Default)]
pub struct Chain<'m> {
    /// What the driver wrote for us, in order.
    pub readable: Scatter<'m>,
    /// What we may write, in order.
    pub writable: Scatter<'m>,
    /// Guest ranges of `writable`, while writes are logged.
    pub ranges: Vec<(GuestAddress, u32)>,
}

impl<'m> Chain<'m> {
    /// Collects the chain that starts at descriptor `head` of `table`.
    pub fn walk(
        &mut self,
        memory: &'m Memory,
        table: VolatileSlice<'m>,
        head: u16,
        indirect: bool,
    ) -> Result<(), ChainError> {
        self.readable.clear();
        self.writable.clear();
        self.ranges.clear();
        let mut left = MAX_CHAIN;
        let last = self.walk_table(memory, table, head, &mut left)?;
        let Some(descriptor) = last else {
            return Ok(());
        };
        // Driver requirements of 2.7.5.3.1: negotiated, one level, and the end of its chain.
        if !indirect || descriptor.has_next() {
            return Err(ChainError::Indirect);
        }
        let (addr, len) = (descriptor.addr(), descriptor.len());
        let bytes = len as usize;
        let absurd = ChainError::Table { addr: addr.0, len };
        if bytes == 0 || !bytes.is_multiple_of(DESCRIPTOR) || bytes / DESCRIPTOR > MAX_CHAIN {
            return Err(absurd);
        }
        let table = memory
            .slice(addr, bytes)
            .ok_or(ChainError::Memory { addr: addr.0, len })?;
        match self.walk_table(memory, table, 0, &mut left)? {
            Some(_) => Err(ChainError::Indirect),
            None => Ok(()),
        }
    }

    /// Records in `log` that the first `data` writable bytes and the very last, the status, were
    /// written.
    pub fn mark_written(&self, log: &DirtyLog, data: u64) {
        let mut left = data;
        for (addr, len) in &self.ranges {
            let part = left.min(u64::from(*len));
            log.mark(*addr, part);
            left -= part;
        }
        let filled = |range: &&(GuestAddress, u32)| range.1 > 0;
        if let Some((addr, len)) = self.ranges.iter().rfind(filled) {
            // The range was found to be guest memory: its end does not overflow.
            log.mark(GuestAddress(addr.0 + u64::from(*len) - 1), 1);
        }
    }

    /// Follows `next` within one table; returns an indirect descriptor that ends the walk.
    fn walk_table(
        &mut self,
        memory: &'m Memory,
        table: VolatileSlice<'m>,
        head: u16,
        left: &mut usize,
    ) -> Result<Option<Descriptor>, ChainError> {
        let mut index = head;
        loop {
            *left = left.checked_sub(1).ok_or(ChainError::TooLong)?;
            // One read of all sixteen bytes: no field can change between check and use.
            let descriptor: Descriptor =
                table
                    .read_obj(DESCRIPTOR * usize::from(index))
                    .map_err(|_| ChainError::Next {
                        next: index,
                        table: table.len() / DESCRIPTOR,
                    })?;
            if descriptor.refers_to_indirect_table() {
                return Ok(Some(descriptor));
            }
            self.add(memory, &descriptor)?;
            if !descriptor.has_next() {
                return Ok(None);
            }
            index = descriptor.next();
        }
    }

    fn add(&mut self, memory: &'m Memory, descriptor: &Descriptor) -> Result<(), ChainError> {
        let (addr, len) = (descriptor.addr(), descriptor.len());
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
        if self.readable.pieces().len() + self.writable.pieces().len() > MAX_PIECES {
            return Err(ChainError::TooManyPieces);
        }
        Ok(())
    }
}
