//! Verifies and decodes stored blocks, directly into the destination where possible.

use std::sync::Arc;

use super::block_cache::{BlockCache, BlockId};
use super::container::{Container, ZFileMap};
use super::error::{BlockError, Error};
use super::pieces::CompressedRun;
use crate::codec::Decoder;
use crate::format::crc;
use crate::format::zfile::CHECKSUM_LEN;
use crate::io::scatter::Cursor;
use vm_memory::VolatileSlice;

/// Decodes blocks for one worker. Keeps the working memory of the codecs, and the last block that was wanted
/// in part, because the next read often wants the rest of it.
#[derive(Default)]
pub struct Unpacker {
    decoder: Decoder,
    bounce: Vec<u8>,
    /// The block whose content is in `bounce`.
    held: Option<BlockId>,
    /// Decoded blocks that all queues share.
    cache: Option<Arc<BlockCache>>,
}

impl Unpacker {
    /// Creates an unpacker that shares decoded blocks in `cache`.
    pub fn with_cache(cache: Option<Arc<BlockCache>>) -> Self {
        Self {
            cache,
            ..Self::default()
        }
    }

    /// Copies a piece of `container` from a block that was decoded earlier, so that its stored bytes need not
    /// be read. Returns whether that was possible.
    pub fn unpack_held(
        &mut self,
        container: &Container,
        piece: &CompressedRun,
        into: &mut Cursor<'_, '_>,
    ) -> bool {
        if piece.count != 1 {
            return false;
        }
        let id = (container.id(), piece.first);
        let wanted = piece.skip as usize..piece.skip as usize + piece.len as usize;
        let kept = self.cache.as_ref().and_then(|cache| cache.get(id));
        let bytes = match &kept {
            Some(block) => block.get(wanted),
            None => self.bounce.get(wanted).filter(|_| self.held == Some(id)),
        };
        if let Some(bytes) = bytes {
            into.write(bytes);
        }
        bytes.is_some()
    }

    /// Decodes `stored`, the stored bytes of all blocks of `piece` in private memory, and writes the wanted
    /// bytes to `into`. Verifies the checksum of a block, if it has one, before decoding it.
    ///
    /// # Errors
    /// [`Error::Block`] for a damaged block. `into` may then be partly written.
    pub fn unpack(
        &mut self,
        container: &Container,
        piece: &CompressedRun,
        stored: &[u8],
        into: &mut Cursor<'_, '_>,
    ) -> Result<(), Error> {
        // Cannot happen: the piece of an uncompressed container has no blocks.
        let Some(zfile_map) = container.zfile_map() else {
            return Ok(());
        };
        let failed = |block, source| Error::Block {
            layer: container.blob().layer().clone(),
            block,
            offset: container.block_offset(zfile_map, block),
            source,
        };
        let mut rest = stored;
        let mut skip = piece.skip as usize;
        let mut wanted = piece.len as usize;
        let end = piece.first + u64::from(piece.count);
        for block in piece.first..end {
            let len = zfile_map.block_len(block);
            let part = wanted.min(len.saturating_sub(skip));
            let shared = self.cache.is_some() && piece.count == 1;
            let result = match take_block(zfile_map, block, end, &mut rest) {
                // Only damaged tables lead to bytes that the block does not have.
                Ok(_) if part == 0 => Err(BlockError::Missing),
                Ok(bytes) if part == len && !shared => self.whole(zfile_map, bytes, len, into),
                Ok(bytes) => {
                    let id = (container.id(), block);
                    self.partly(zfile_map, bytes, len, id)
                        .map(|plain| into.write(&plain[skip..skip + part]))
                }
                Err(error) => Err(error),
            };
            result.map_err(|source| failed(block, source))?;
            wanted -= part;
            skip = 0;
        }
        match wanted {
            0 => Ok(()),
            _ => Err(failed(piece.first, BlockError::Missing)),
        }
    }

    /// Decodes a whole block, directly into its destination if that is contiguous.
    fn whole(
        &mut self,
        zfile_map: &ZFileMap,
        stored: &[u8],
        len: usize,
        into: &mut Cursor<'_, '_>,
    ) -> Result<(), BlockError> {
        let algorithm = zfile_map.header().format.algorithm;
        if let Some(target) = into.take_contiguous(len) {
            return Ok(self.decoder.decode(algorithm, stored, &target)?);
        }
        self.held = None;
        let plain = grown(&mut self.bounce, len);
        let target = VolatileSlice::from(&mut *plain);
        self.decoder.decode(algorithm, stored, &target)?;
        into.write(plain);
        Ok(())
    }

    /// Decodes a block into the bounce buffer and keeps it, unless it is there already.
    fn partly(
        &mut self,
        zfile_map: &ZFileMap,
        stored: &[u8],
        len: usize,
        id: (u64, u64),
    ) -> Result<&[u8], BlockError> {
        if self.held != Some(id) {
            self.held = None;
            let target = VolatileSlice::from(grown(&mut self.bounce, len));
            let algorithm = zfile_map.header().format.algorithm;
            self.decoder.decode(algorithm, stored, &target)?;
            self.held = Some(id);
            if let Some(cache) = &self.cache {
                cache.insert(id, self.bounce[..len].into());
            }
        }
        Ok(&self.bounce[..len])
    }
}

/// Splits the next block of a run, whose blocks are below `end`, off the stored bytes and verifies its checksum.
/// Returns its compressed bytes.
fn take_block<'s>(
    zfile_map: &ZFileMap,
    block: u64,
    end: u64,
    rest: &mut &'s [u8],
) -> Result<&'s [u8], BlockError> {
    let table = zfile_map.table();
    let len = match block + 1 == end {
        // Most runs are one block: its bytes are all there are.
        true => Some(rest.len()),
        false => {
            let len = table.offset(block + 1).checked_sub(table.offset(block));
            len.and_then(|len| usize::try_from(len).ok())
        }
    };
    let split = len.and_then(|len| rest.split_at_checked(len));
    let (stored, after) = split.ok_or(BlockError::Missing)?;
    *rest = after;
    verified(stored, zfile_map.header().format.checksum)
}

/// Verifies the checksum at the end of a stored block, if it has one, and returns the compressed bytes.
///
/// # Errors
/// [`BlockError::Checksum`] for a wrong checksum, [`BlockError::Missing`] for a block without one.
pub fn verified(stored: &[u8], checksum: bool) -> Result<&[u8], BlockError> {
    if !checksum {
        return Ok(stored);
    }
    let (bytes, checksum) = stored
        .split_last_chunk::<CHECKSUM_LEN>()
        .ok_or(BlockError::Missing)?;
    let found = crc::raw(crc::BLOCK_SEED, bytes);
    let expected = u32::from_le_bytes(*checksum);
    if found == expected {
        Ok(bytes)
    } else {
        Err(BlockError::Checksum { found, expected })
    }
}

/// Returns the first `len` bytes of a buffer, which grows if it is shorter.
fn grown(buffer: &mut Vec<u8>, len: usize) -> &mut [u8] {
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
    &mut buffer[..len]
}
