//! The wrappers of a layer, taken apart as far as they hold together.

use vm_memory::VolatileSlice;

use super::super::Error;
use super::Findings;
use crate::codec::Decoder;
use crate::format::zfile::{BlockTable, HEADER_LEN, Header, Part, TableReader, settle};
use crate::format::{tar, zfile};
use crate::image::unpack::verified;
use crate::image::{self, BlockError};
use crate::source::{self, Blob, LayerRef};

/// Bytes of a header that mean nothing, and are zero unless an old tool wrote them.
const RESERVED: std::ops::Range<usize> = 89..HEADER_LEN;

/// Bytes of a block table read at a time.
const TABLE_CHUNK: usize = 1024 * 1024;

/// A layer's file, and what could be made out of its wrappers.
pub(super) struct Container {
    pub(super) blob: Blob,
    pub(super) payload: tar::Payload,
    pub(super) zfile_map: Option<ZFileMap>,
}

/// What could be made out of a ZFile.
pub(super) struct ZFileMap {
    pub(super) header: Header,
    pub(super) table: BlockTable,
}

/// Where in a file a byte of the layer is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    /// Number of its block, if it is in one.
    pub(super) block: Option<u64>,
    /// Byte of the file at which it is, or at which its block starts.
    pub(super) offset: u64,
}

/// Why a piece of a layer is not to be had.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unreadable {
    /// The file cannot be read.
    #[error(transparent)]
    Source(#[from] source::Error),
    /// A block is damaged.
    #[error(transparent)]
    Block(#[from] BlockError),
}

impl Container {
    /// Opens a file and tells what is wrong with its wrappers. `None`: too much to go on.
    pub(super) fn open(
        layer: &LayerRef,
        findings: &mut Findings<'_>,
    ) -> Result<Option<Self>, Error> {
        let blob = match layer.open() {
            Ok(blob) => blob,
            Err(error) => {
                findings.broken(None, &error)?;
                return Ok(None);
            }
        };
        let Some(payload) = find_payload(&blob, findings)? else {
            return Ok(None);
        };
        let zfile_map = match find_zfile_map(&blob, payload, findings)? {
            Found::ZFileMap(zfile_map) => Some(zfile_map),
            Found::Nothing => None,
            Found::Broken => return Ok(None),
        };
        Ok(Some(Self {
            blob,
            payload,
            zfile_map,
        }))
    }

    /// Bytes of the layer.
    pub(super) fn len(&self) -> u64 {
        match &self.zfile_map {
            Some(zfile_map) => zfile_map.header.extent.original_size,
            None => self.payload.len,
        }
    }

    /// Where a byte of the layer, which lies inside it, is in the file.
    pub(super) fn place(&self, at: u64) -> Place {
        match &self.zfile_map {
            None => Place {
                block: None,
                offset: self.payload.offset + at,
            },
            Some(ZFileMap { header, table }) => {
                let block = at / u64::from(header.format.block_size);
                Place {
                    block: Some(block),
                    offset: self.payload.offset + table.offset(block),
                }
            }
        }
    }

    /// Number of compressed blocks.
    pub(super) fn blocks(&self) -> u64 {
        let zfile_map = self.zfile_map.as_ref();
        zfile_map.map_or(0, |zfile_map| zfile_map.table.blocks())
    }
}

/// Reads pieces of a layer for one thread.
#[derive(Default)]
pub(super) struct PieceReader {
    decoder: Decoder,
    stored: Vec<u8>,
    plain: Vec<u8>,
}

impl PieceReader {
    /// One block, verified and unpacked.
    pub(super) fn block(
        &mut self,
        container: &Container,
        zfile_map: &ZFileMap,
        block: u64,
    ) -> Result<&[u8], Unreadable> {
        let ZFileMap { header, table } = zfile_map;
        let format = &header.format;
        let start = table.offset(block);
        let stored_len = (table.offset(block + 1) - start) as usize;
        self.stored.resize(stored_len, 0);
        let blob = &container.blob;
        blob.read_exact_at(&mut self.stored, container.payload.offset + start)?;
        let bytes = verified(&self.stored, format.checksum)?;

        let block_size = u64::from(format.block_size);
        let plain_len = block_size.min(header.extent.original_size - block * block_size);
        self.plain.resize(plain_len as usize, 0);
        let into = VolatileSlice::from(&mut self.plain[..]);
        let decoded = self.decoder.decode(format.algorithm, bytes, &into);
        decoded.map_err(BlockError::from)?;
        Ok(&self.plain)
    }

    /// Fills `into` with the layer's bytes from `offset` on, which lie inside it.
    pub(super) fn read(
        &mut self,
        container: &Container,
        offset: u64,
        into: &mut [u8],
    ) -> Result<(), Unreadable> {
        let Some(zfile_map) = &container.zfile_map else {
            let at = container.payload.offset + offset;
            return Ok(container.blob.read_exact_at(into, at)?);
        };
        let block_size = u64::from(zfile_map.header.format.block_size);
        let (mut at, mut rest) = (offset, into);
        while !rest.is_empty() {
            let plain = self.block(container, zfile_map, at / block_size)?;
            let plain = plain.get((at % block_size) as usize..).unwrap_or_default();
            let part = plain.len().min(rest.len());
            if part == 0 {
                return Err(BlockError::Missing.into());
            }
            let (now, later) = rest.split_at_mut(part);
            now.copy_from_slice(&plain[..part]);
            (at, rest) = (at + part as u64, later);
        }
        Ok(())
    }
}

/// Looks through the tar wrapper.
fn find_payload(blob: &Blob, findings: &mut Findings<'_>) -> Result<Option<tar::Payload>, Error> {
    let mut head = [0; tar::PREFIX];
    let file_len = blob.len();
    let head = &mut head[..file_len.min(tar::PREFIX as u64) as usize];
    if let Err(error) = blob.read_exact_at(head, 0) {
        findings.broken(Some(0), &error)?;
        return Ok(None);
    }
    let (offset, len) = match tar::payload(head) {
        Ok(Some(tar::Payload { offset, len })) => (offset, len),
        Ok(None) => (0, file_len),
        Err(error) => {
            findings.broken(Some(0), &error)?;
            return Ok(None);
        }
    };
    let there = file_len.saturating_sub(offset);
    if len > there {
        let layer = blob.layer().clone();
        let error = image::Error::TarPayload {
            layer,
            offset,
            len,
            file_len,
        };
        findings.broken(Some(0), &error)?;
    }
    let len = len.min(there);
    Ok(Some(tar::Payload { offset, len }))
}

enum Found {
    /// The payload is no ZFile.
    Nothing,
    /// It is one, and its blocks can be found.
    ZFileMap(ZFileMap),
    /// It is one, and nothing tells where its blocks are.
    Broken,
}

/// Reads header, trailer and block table of a ZFile; what one of the first two cannot tell, the
/// other perhaps can.
fn find_zfile_map(
    blob: &Blob,
    payload: tar::Payload,
    findings: &mut Findings<'_>,
) -> Result<Found, Error> {
    let Some(trailer_at) = payload.len.checked_sub(HEADER_LEN as u64) else {
        return Ok(Found::Nothing);
    };
    let structure = |at: u64, part: Part, findings: &mut Findings<'_>| {
        let mut bytes = [0; HEADER_LEN];
        let offset = Some(payload.offset + at);
        if let Err(error) = blob.read_exact_at(&mut bytes, payload.offset + at) {
            findings.broken(offset, &error)?;
            return Ok(None);
        }
        if part == Part::Header && !Header::has_magic(&bytes) {
            return Ok(None);
        }
        match Header::decode(&bytes, part) {
            Ok(header) => {
                if bytes[RESERVED].iter().any(|byte| *byte != 0) {
                    let what = format!("{part} with reserved bytes in use, as old tools left it");
                    findings.note(offset, what)?;
                }
                if !header.digest {
                    let what = format!("{part} without digest: damage to it may go unseen");
                    findings.note(offset, what)?;
                }
                Ok(Some(Some(header)))
            }
            Err(error) => {
                findings.broken(offset, &error)?;
                Ok::<_, Error>(Some(None))
            }
        }
    };
    let Some(first) = structure(0, Part::Header, findings)? else {
        return Ok(Found::Nothing);
    };
    let last = structure(trailer_at, Part::Trailer, findings)?.flatten();
    let (Some(first), Some(last)) = (first.or(last), last.or(first)) else {
        return Ok(Found::Broken);
    };
    let settled = match settle(&first, &last, trailer_at) {
        Err(error @ zfile::Error::Disagree(_)) => {
            findings.broken(Some(payload.offset), &error)?;
            settle(&last, &last, trailer_at)
        }
        settled => settled,
    };
    let header = match settled {
        Ok(header) => header,
        Err(error) => {
            findings.broken(Some(payload.offset), &error)?;
            return Ok(Found::Broken);
        }
    };
    let table_at = payload.offset + header.extent.table_offset;
    let table = match read_table(blob, payload, &header) {
        Err(ref error @ TableError::Format(zfile::Error::TableChecksum { .. })) => {
            findings.broken(Some(table_at), error)?;
            // Its numbers may fit all the same, and then most blocks can be found.
            let mut unverified = header;
            unverified.digest = false;
            read_table(blob, payload, &unverified)
        }
        table => table,
    };
    match table {
        Ok(table) => Ok(Found::ZFileMap(ZFileMap { header, table })),
        Err(error) => {
            findings.broken(Some(table_at), &error)?;
            Ok(Found::Broken)
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum TableError {
    #[error(transparent)]
    Source(#[from] source::Error),
    #[error(transparent)]
    Format(#[from] zfile::Error),
}

fn read_table(
    blob: &Blob,
    payload: tar::Payload,
    header: &Header,
) -> Result<BlockTable, TableError> {
    let mut reader = TableReader::new(header);
    let mut at = payload.offset + header.extent.table_offset;
    let mut left = header.extent.blocks * 4;
    let mut chunk = vec![0; left.min(TABLE_CHUNK as u64) as usize];
    while left > 0 {
        let part = left.min(chunk.len() as u64);
        let chunk = &mut chunk[..part as usize];
        blob.read_exact_at(chunk, at)?;
        reader.read(chunk)?;
        (at, left) = (at + part, left - part);
    }
    Ok(reader.finish()?)
}
