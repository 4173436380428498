//! The wrappers of a layer, unwrapped as far as they are intact.

use std::sync::Arc;

use vm_memory::VolatileSlice;

use super::super::Error;
use super::findings::{FilePlace, Findings};
use crate::codec::Decoder;
use crate::format::zfile::BlockFormat;
use crate::image::probe::{Judge, probe};
use crate::image::unpack::verified;
use crate::image::{self, BlockError, Container, ZFileMap};
use crate::source::{self, Blob};

/// A piece of a layer cannot be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unreadable {
    /// The file cannot be read.
    #[error(transparent)]
    Source(#[from] source::Error),
    /// A block is damaged.
    #[error(transparent)]
    Block(#[from] BlockError),
}

/// Reports what is wrong with the wrappers of a layer, and continues where possible.
struct Tell<'t, 'f> {
    findings: &'t mut Findings<'f>,
}

/// The check of a layer ends early.
enum Stop {
    /// The damage, which was reported, leaves nothing to check.
    Broken,
    /// A finding cannot be reported.
    Failed(Error),
}

impl Judge for Tell<'_, '_> {
    type Stop = Stop;

    fn broken(&mut self, offset: u64, error: image::Error) -> Result<(), Stop> {
        let told = match &error {
            // The finding itself names layer and place.
            image::Error::Tar { source, .. } => self.findings.broken(Some(offset), source),
            image::Error::ZFile { source, .. } => self.findings.broken(Some(offset), source),
            error => self.findings.broken(Some(offset), error),
        };
        told.map_err(Stop::Failed)
    }

    fn fatal(&mut self, offset: u64, error: image::Error) -> Stop {
        let told = self.broken(offset, error);
        told.err().unwrap_or(Stop::Broken)
    }

    fn note(&mut self, offset: u64, what: String) -> Result<(), Stop> {
        let noted = self.findings.note(Some(offset), what);
        noted.map_err(Stop::Failed)
    }
}

/// Unwraps a layer, and reports damage of its wrappers. `None`: the damage leaves nothing to check.
pub(super) fn open(
    blob: Arc<Blob>,
    findings: &mut Findings<'_>,
) -> Result<Option<Container>, Error> {
    match probe(blob, &mut Tell { findings }) {
        Ok(container) => Ok(Some(container)),
        Err(Stop::Broken) => Ok(None),
        Err(Stop::Failed(error)) => Err(error),
    }
}

/// Returns where the file holds byte `at` of the layer.
pub(super) fn place(container: &Container, at: u64) -> FilePlace {
    match container.zfile_map() {
        None => FilePlace {
            block: None,
            offset: container.payload().offset + at,
        },
        Some(zfile_map) => {
            let block = at / u64::from(zfile_map.header().format.block_size);
            FilePlace {
                block: Some(block),
                offset: container.block_offset(zfile_map, block),
            }
        }
    }
}

/// Reads pieces of a layer, on one thread.
#[derive(Default)]
pub(super) struct PieceReader {
    decoder: Decoder,
    stored: Vec<u8>,
    plain: Vec<u8>,
}

impl PieceReader {
    /// Reads, verifies and decodes one block.
    pub(super) fn block(
        &mut self,
        container: &Container,
        zfile_map: &ZFileMap,
        block: u64,
    ) -> Result<&[u8], Unreadable> {
        let (header, table) = (zfile_map.header(), zfile_map.table());
        let format = &header.format;
        let start = table.offset(block);
        let stored_len = (table.offset(block + 1) - start) as usize;
        let at = container.block_offset(zfile_map, block);
        let Self {
            decoder,
            stored,
            plain,
        } = self;
        stored.resize(stored_len, 0);
        plain.resize(zfile_map.block_len(block), 0);
        container.blob().read_decoded(stored, at, |stored| {
            let decoded = decode(decoder, format, stored, plain);
            decoded.map_err(Unreadable::from)
        })?;
        Ok(plain)
    }

    /// Fills `into` with the layer's bytes from `offset` on, which lie inside the layer.
    pub(super) fn read(
        &mut self,
        container: &Container,
        offset: u64,
        into: &mut [u8],
    ) -> Result<(), Unreadable> {
        let Some(zfile_map) = container.zfile_map() else {
            let at = container.payload().offset + offset;
            return Ok(container.blob().read_exact_at(into, at)?);
        };
        let block_size = u64::from(zfile_map.header().format.block_size);
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

/// Verifies and decodes a stored block.
fn decode(
    decoder: &mut Decoder,
    format: &BlockFormat,
    stored: &[u8],
    plain: &mut [u8],
) -> Result<(), BlockError> {
    let bytes = verified(stored, format.checksum)?;
    let into = VolatileSlice::from(plain);
    Ok(decoder.decode(format.algorithm, bytes, &into)?)
}
