//! One blob seen through its wrappers: the bytes of an LSMT layer, wherever they lie.
//!
//! `file -> tar member -> ZFile blocks -> layer bytes`, each step but the first optional and
//! detected from content. A range of layer bytes becomes [`Piece`]s of the file.

use std::sync::atomic::{AtomicU64, Ordering};

use super::error::Error;
use super::plan::{CompressedRun, Piece};
use crate::format::{tar, zfile};
use crate::source::Blob;

/// Most stored bytes of one [`CompressedRun`] piece, so that one read into a buffer of this size serves
/// it. Any single block is smaller.
pub const MAX_STORED: usize = 256 * 1024;

/// Bytes of a block table read at a time.
const TABLE_CHUNK: usize = 256 * 1024;

/// A layer's file and where in it the layer's bytes are.
#[derive(Debug)]
pub struct Container {
    blob: Blob,
    payload: tar::Payload,
    zfile_map: Option<ZFileMap>,
    id: u64,
}

/// How a ZFile holds the layer's bytes.
#[derive(Debug)]
pub struct ZFileMap {
    header: zfile::Header,
    table: zfile::BlockTable,
    shift: u32,
}

impl ZFileMap {
    /// What the ZFile says about itself.
    pub fn header(&self) -> &zfile::Header {
        &self.header
    }

    /// Where its blocks are.
    pub fn table(&self) -> &zfile::BlockTable {
        &self.table
    }

    /// Uncompressed bytes of a block: fewer in the last one.
    #[inline]
    pub fn block_len(&self, block: u64) -> usize {
        let rest = self.header.extent.original_size - (block << self.shift);
        rest.min(u64::from(self.header.format.block_size)) as usize
    }
}

impl Container {
    /// Reads the wrappers of a blob, and verifies their checksums. Opens no file.
    ///
    /// # Errors
    /// [`Error::Source`] if the blob cannot be read; the others name the wrapper that is broken.
    pub fn load(blob: Blob) -> Result<Self, Error> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(0);
        let payload = find_payload(&blob)?;
        let zfile_map = find_zfile_map(&blob, payload)?;
        blob.map();
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        Ok(Self {
            blob,
            payload,
            zfile_map,
            id,
        })
    }

    /// The file.
    pub fn blob(&self) -> &Blob {
        &self.blob
    }

    /// Where the tar wrapper's payload is; the whole file without one.
    pub fn payload(&self) -> tar::Payload {
        self.payload
    }

    /// Whether there is a tar wrapper.
    pub fn is_tar(&self) -> bool {
        self.payload.offset != 0
    }

    /// The ZFile the layer's bytes are packed in, if they are.
    pub fn zfile_map(&self) -> Option<&ZFileMap> {
        self.zfile_map.as_ref()
    }

    /// Bytes of the layer.
    pub fn len(&self) -> u64 {
        match &self.zfile_map {
            Some(zfile_map) => zfile_map.header.extent.original_size,
            None => self.payload.len,
        }
    }

    /// Whether the layer has no byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tells this container from all others of the process.
    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// Byte of the file at which a block starts.
    pub(super) fn block_offset(&self, zfile_map: &ZFileMap, block: u64) -> u64 {
        self.payload.offset + zfile_map.table.offset(block)
    }

    /// Where the layer's bytes from `offset` on are: as many of the next `len` as one piece can
    /// tell, which is at least one. The range lies inside the layer and is not empty; `layer` is
    /// the number to put into the piece.
    #[inline]
    pub(super) fn piece(&self, layer: u16, offset: u64, len: u64) -> Piece {
        match &self.zfile_map {
            None => Piece::Plain {
                layer,
                offset: self.payload.offset + offset,
                len,
            },
            Some(zfile_map) => Piece::Compressed(self.packed(zfile_map, layer, offset, len)),
        }
    }

    /// Starts to bring closer what [`Container::piece`] needs for the layer's byte `offset`.
    #[inline]
    pub(super) fn prefetch_table(&self, offset: u64) {
        if let Some(ZFileMap { table, shift, .. }) = &self.zfile_map {
            table.prefetch(offset >> shift);
        }
    }

    fn packed(&self, zfile_map: &ZFileMap, layer: u16, offset: u64, len: u64) -> CompressedRun {
        let ZFileMap { table, shift, .. } = zfile_map;
        let first = offset >> shift;
        let start = table.offset(first);
        let stored = |end: u64| table.offset(end) - start;
        let mut end = ((offset + len - 1) >> shift) + 1;
        if stored(end) > MAX_STORED as u64 {
            // One block always fits; find the most that do.
            let (mut fits, mut too_many) = (first + 1, end);
            while fits + 1 < too_many {
                let middle = fits + (too_many - fits) / 2;
                if stored(middle) > MAX_STORED as u64 {
                    too_many = middle;
                } else {
                    fits = middle;
                }
            }
            end = fits;
        }
        CompressedRun {
            layer,
            first,
            count: (end - first) as u32,
            skip: (offset - (first << shift)) as u32,
            offset: self.payload.offset + start,
            stored: stored(end) as u32,
            len: len.min((end << shift) - offset),
        }
    }
}

/// Looks through the tar wrapper, if there is one.
fn find_payload(blob: &Blob) -> Result<tar::Payload, Error> {
    let mut head = [0; tar::PREFIX];
    let file_len = blob.len();
    let head = &mut head[..file_len.min(tar::PREFIX as u64) as usize];
    blob.read_exact_at(head, 0)?;
    let layer = || blob.layer().clone();
    let payload = tar::payload(head).map_err(|source| Error::Tar {
        layer: layer(),
        source,
    })?;
    let Some(payload) = payload else {
        return Ok(tar::Payload {
            offset: 0,
            len: file_len,
        });
    };
    let tar::Payload { offset, len } = payload;
    if offset.checked_add(len).is_none_or(|end| end > file_len) {
        return Err(Error::TarPayload {
            layer: layer(),
            offset,
            len,
            file_len,
        });
    }
    Ok(payload)
}

/// Reads header, trailer and block table, if the payload is a ZFile.
fn find_zfile_map(blob: &Blob, payload: tar::Payload) -> Result<Option<ZFileMap>, Error> {
    let header_len = zfile::HEADER_LEN as u64;
    let mut bytes = [0; zfile::HEADER_LEN];
    if payload.len < header_len {
        return Ok(None);
    }
    blob.read_exact_at(&mut bytes, payload.offset)?;
    if !zfile::Header::has_magic(&bytes) {
        return Ok(None);
    }
    let failed = |at: u64| {
        let (layer, offset) = (blob.layer().clone(), payload.offset + at);
        move |source| Error::ZFile {
            layer,
            offset,
            source,
        }
    };
    let header = zfile::Header::decode(&bytes, zfile::Part::Header).map_err(failed(0))?;
    let trailer_at = payload.len - header_len;
    blob.read_exact_at(&mut bytes, payload.offset + trailer_at)?;
    let trailer = zfile::Header::decode(&bytes, zfile::Part::Trailer);
    let trailer = trailer.map_err(failed(trailer_at))?;
    let header = zfile::settle(&header, &trailer, trailer_at).map_err(failed(0))?;

    let table_at = header.extent.table_offset;
    let mut table = zfile::TableReader::new(&header);
    let mut left = header.extent.blocks * 4;
    let mut at = payload.offset + table_at;
    let mut chunk = vec![0; left.min(TABLE_CHUNK as u64) as usize];
    while left > 0 {
        let len = left.min(TABLE_CHUNK as u64);
        let chunk = &mut chunk[..len as usize];
        blob.read_exact_at(chunk, at)?;
        table.read(chunk).map_err(failed(table_at))?;
        (at, left) = (at + len, left - len);
    }
    Ok(Some(ZFileMap {
        header,
        table: table.finish().map_err(failed(table_at))?,
        shift: header.format.block_size.trailing_zeros(),
    }))
}
