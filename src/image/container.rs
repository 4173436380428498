//! A blob and its wrappers: maps bytes of an LSMT layer to bytes of the file.
//!
//! `file -> tar member -> ZFile blocks -> layer bytes`; tar and ZFile are optional, and detected from
//! the content. A range of layer bytes maps to [`Piece`]s of the file.
#![cfg_attr(
    not(test),
    warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)
)]

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::pieces::{CompressedRun, Piece};
use crate::format::{tar, zfile};
use crate::source::Blob;

/// Most stored bytes of one [`CompressedRun`], so that a buffer of this size is enough for it. Every block
/// is smaller.
pub const MAX_STORED: usize = 256 * 1024;

/// The file of a layer, and where in it the bytes of the layer are.
#[derive(Debug)]
pub struct Container {
    blob: Arc<Blob>,
    payload: tar::Payload,
    zfile_map: Option<ZFileMap>,
    id: u64,
}

/// Map of a ZFile: header and block table.
#[derive(Debug)]
pub struct ZFileMap {
    header: zfile::Header,
    table: zfile::BlockTable,
    shift: u32,
}

impl ZFileMap {
    pub(super) fn new(header: zfile::Header, table: zfile::BlockTable) -> Self {
        Self {
            header,
            table,
            shift: header.format.block_size.trailing_zeros(),
        }
    }

    /// The header of the ZFile.
    pub fn header(&self) -> &zfile::Header {
        &self.header
    }

    /// The block table.
    pub fn table(&self) -> &zfile::BlockTable {
        &self.table
    }

    /// Number of blocks that start before this byte of the ZFile.
    fn blocks_before(&self, byte: u64) -> u64 {
        let (mut before, mut after) = (0, self.table.blocks());
        while before < after {
            let middle = u64::midpoint(before, after);
            match self.table.offset(middle) < byte {
                true => before = middle.saturating_add(1),
                false => after = middle,
            }
        }
        before
    }

    /// Number of blocks that hold the first `bytes` bytes of the layer, at least one.
    #[inline]
    fn blocks_to(&self, bytes: u64) -> u64 {
        (bytes.wrapping_sub(1) >> self.shift).wrapping_add(1)
    }

    /// Number of uncompressed bytes of a block; the last block may have fewer than the block size.
    #[inline]
    pub fn block_len(&self, block: u64) -> usize {
        let start = block << self.shift;
        let rest = self.header.totals.original_size.saturating_sub(start);
        rest.min(u64::from(self.header.format.block_size)) as usize
    }
}

impl Container {
    /// Creates the container of a blob whose wrappers were parsed.
    pub(super) fn new(blob: Arc<Blob>, payload: tar::Payload, zfile_map: Option<ZFileMap>) -> Self {
        static NEXT_ID: AtomicU64 = AtomicU64::new(0);
        Self {
            blob,
            payload,
            zfile_map,
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
        }
    }

    /// The blob.
    pub fn blob(&self) -> &Blob {
        &self.blob
    }

    /// Payload of the tar wrapper; without one, the whole file.
    pub fn payload(&self) -> tar::Payload {
        self.payload
    }

    /// Whether there is a tar wrapper.
    pub fn is_tar(&self) -> bool {
        self.payload.offset != 0
    }

    /// Map of the ZFile, if the layer is compressed.
    pub fn zfile_map(&self) -> Option<&ZFileMap> {
        self.zfile_map.as_ref()
    }

    /// Number of bytes of the layer.
    #[expect(
        clippy::len_without_is_empty,
        reason = "an empty container is an error"
    )]
    pub fn len(&self) -> u64 {
        match &self.zfile_map {
            Some(zfile_map) => zfile_map.header.totals.original_size,
            None => self.payload.len,
        }
    }

    /// Returns the first byte of the layer from `at` on that is not in a hole of the file, or the end of the
    /// layer. Bytes in a hole are zeros.
    pub fn data_from(&self, at: u64) -> u64 {
        if self.zfile_map.is_some() {
            return at;
        }
        let found = self.blob.data_from(self.payload.offset.saturating_add(at));
        found
            .saturating_sub(self.payload.offset)
            .min(self.payload.len)
    }

    /// Number of the container, unique in the process.
    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// Returns the bytes of the file that hold `range` of the layer, which is not empty and ends inside the
    /// layer.
    pub fn stored(&self, range: Range<u64>) -> Range<u64> {
        match &self.zfile_map {
            None => self.file_offset(range.start)..self.file_offset(range.end),
            Some(map) => {
                let start = self.block_offset(map, range.start >> map.shift);
                let end = map.blocks_to(range.end);
                start..self.block_offset(map, end)
            }
        }
    }

    /// Returns the bytes of the layer that `range` of the file holds in full or in part; `None` if there are
    /// none.
    pub fn held(&self, range: Range<u64>) -> Option<Range<u64>> {
        let start = range.start.saturating_sub(self.payload.offset);
        let end = range.end.checked_sub(self.payload.offset)?;
        let held = match &self.zfile_map {
            None => start..end.min(self.payload.len),
            Some(map) => {
                let first = map.blocks_before(start.saturating_add(1)).saturating_sub(1);
                (first << map.shift)..(map.blocks_before(end) << map.shift).min(self.len())
            }
        };
        Some(held).filter(|held| held.start < held.end)
    }

    /// Byte of the file at which a block starts.
    pub fn block_offset(&self, zfile_map: &ZFileMap, block: u64) -> u64 {
        self.file_offset(zfile_map.table.offset(block))
    }

    /// Byte of the file at which byte `at` of the payload is.
    ///
    /// The sum wraps for a number that is beyond any file: reading there fails.
    #[inline]
    fn file_offset(&self, at: u64) -> u64 {
        self.payload.offset.wrapping_add(at)
    }

    /// Maps the bytes of the layer from `offset` on to a piece: as many of the next `len` as fit into one
    /// piece, at least one. The range is not empty and ends inside the layer; `layer` is the number of the
    /// layer in the piece.
    #[inline]
    pub(super) fn piece(&self, layer: u16, offset: u64, len: u64) -> Piece {
        match &self.zfile_map {
            None => Piece::Plain {
                layer,
                offset: self.file_offset(offset),
                len,
            },
            Some(zfile_map) => {
                Piece::Compressed(self.compressed_run(zfile_map, layer, offset, len))
            }
        }
    }

    /// Prefetches the entry of the block table that [`Container::piece`] needs for byte `offset`.
    #[inline]
    pub(super) fn prefetch_table(&self, offset: u64) {
        if let Some(ZFileMap { table, shift, .. }) = &self.zfile_map {
            table.prefetch(offset >> shift);
        }
    }

    fn compressed_run(
        &self,
        zfile_map: &ZFileMap,
        layer: u16,
        offset: u64,
        len: u64,
    ) -> CompressedRun {
        let ZFileMap { table, shift, .. } = zfile_map;
        let first = offset >> shift;
        let start = table.offset(first);
        let stored = |end: u64| table.offset(end).saturating_sub(start);
        let mut end = zfile_map.blocks_to(offset.wrapping_add(len));
        let mut bytes = stored(end);
        if bytes > MAX_STORED as u64 {
            // One block always fits. Find the largest number of blocks that do.
            let (mut fits, mut too_many) = (first.saturating_add(1), end);
            while fits.saturating_add(1) < too_many {
                let middle = u64::midpoint(fits, too_many);
                if stored(middle) > MAX_STORED as u64 {
                    too_many = middle;
                } else {
                    fits = middle;
                }
            }
            end = fits;
            // Too few for a block whose damaged table says more: unpacking it fails.
            bytes = stored(end).min(MAX_STORED as u64);
        }
        CompressedRun {
            layer,
            first,
            count: end.wrapping_sub(first) as u32,
            skip: offset.wrapping_sub(first << shift) as u32,
            offset: self.file_offset(start),
            stored: bytes as u32,
            len: len.min((end << shift).wrapping_sub(offset)),
        }
    }
}
