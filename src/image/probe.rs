//! Takes the wrappers of a blob apart: `file -> tar member -> ZFile -> layer`.
//!
//! Opening a layer stops at the first thing that is broken; checking one goes on as long as anything
//! is left to go by. Both look through wrappers here, and differ in their [`Judge`].
#![cfg_attr(
    not(test),
    warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)
)]

use std::sync::Arc;

use super::container::{Container, ZFileMap};
use super::error::Error;
use super::padding;
use crate::format::foreign::Foreign;
use crate::format::zfile::{self, HEADER_LEN, Header, HeaderKind};
use crate::format::{lsmt, tar};
use crate::source::Blob;

/// Bytes of a ZFile header without a meaning, which are zero unless an old tool wrote them.
const RESERVED: std::ops::Range<usize> = 89..HEADER_LEN;

/// Bytes of a block table read at a time.
const TABLE_CHUNK: usize = 256 * 1024;

/// Decides what becomes of what is found. Offsets are bytes of the file.
pub trait Judge {
    /// Ends the probe.
    type Stop;

    /// Something is broken, and there are other ways to go on.
    ///
    /// # Errors
    /// The probe is to end here.
    fn broken(&mut self, offset: u64, error: Error) -> Result<(), Self::Stop>;

    /// Something is broken that leaves nothing to go by.
    fn fatal(&mut self, offset: u64, error: Error) -> Self::Stop;

    /// Something is unusual, and not broken.
    ///
    /// # Errors
    /// The probe is to end here.
    fn note(&mut self, offset: u64, what: String) -> Result<(), Self::Stop>;
}

/// Stops at the first thing that is broken.
pub struct Strict;

impl Judge for Strict {
    type Stop = Error;

    fn broken(&mut self, _: u64, error: Error) -> Result<(), Error> {
        Err(error)
    }

    fn fatal(&mut self, _: u64, error: Error) -> Error {
        error
    }

    fn note(&mut self, _: u64, _: String) -> Result<(), Error> {
        Ok(())
    }
}

/// Finds the layer's bytes in a blob.
///
/// # Errors
/// As `judge` says.
pub fn probe<J: Judge>(blob: Arc<Blob>, judge: &mut J) -> Result<Container, J::Stop> {
    let payload = find_payload(&blob, judge)?;
    let zfile_map = Probe {
        blob: &blob,
        payload,
        judge,
    }
    .zfile_map()?;
    Ok(Container::new(blob, payload, zfile_map))
}

/// Looks through the tar wrapper; without one, the payload is the whole file.
fn find_payload<J: Judge>(blob: &Blob, judge: &mut J) -> Result<tar::Payload, J::Stop> {
    let mut head = [0; tar::PREFIX];
    let file_len = blob.len();
    let head_len = file_len.min(tar::PREFIX as u64) as usize;
    let head = head.get_mut(..head_len).unwrap_or_default();
    let read = blob.read_exact_at(head, 0);
    read.map_err(|error| judge.fatal(0, error.into()))?;
    let layer = || blob.layer().clone();
    let payload = tar::payload(head).map_err(|source| {
        let layer = layer();
        judge.fatal(0, Error::Tar { layer, source })
    })?;
    let Some(tar::Payload { offset, len }) = payload else {
        if let Some(kind) = Foreign::by_start(head) {
            let layer = layer();
            return Err(judge.fatal(0, Error::Foreign { layer, kind }));
        }
        let (offset, len) = (0, file_len);
        return Ok(tar::Payload { offset, len });
    };
    let there = file_len.saturating_sub(offset);
    if len > there {
        let layer = layer();
        let error = Error::TarPayload {
            layer,
            offset,
            len,
            file_len,
        };
        judge.broken(0, error)?;
    }
    let len = len.min(there);
    Ok(tar::Payload { offset, len })
}

/// A payload that may be a ZFile.
struct Probe<'p, J> {
    blob: &'p Blob,
    payload: tar::Payload,
    judge: &'p mut J,
}

impl<J: Judge> Probe<'_, J> {
    /// Reads header, trailer and block table, if the payload is a ZFile.
    fn zfile_map(&mut self) -> Result<Option<ZFileMap>, J::Stop> {
        if self.payload.len < HEADER_LEN as u64 {
            return Ok(None);
        }
        let bytes = self.read(0)?;
        if !Header::has_magic(&bytes) {
            return Ok(None);
        }
        let first = match Header::decode(&bytes, HeaderKind::Header) {
            Ok(header) => Some(self.noted(0, &bytes, header, HeaderKind::Header)?),
            Err(error) => {
                self.broken(0, error)?;
                None
            }
        };
        let found = padding::zfile_trailer(self.blob, self.payload, first.as_ref());
        let at = found.map_err(|error| self.judge.fatal(self.payload.offset, error))?;
        let bytes = self.read(at)?;
        let last = match (Header::decode(&bytes, HeaderKind::Trailer), first) {
            (Ok(trailer), _) => self.noted(at, &bytes, trailer, HeaderKind::Trailer)?,
            (Err(error), None) => return Err(self.fatal(at, error)),
            (Err(error), Some(first)) => {
                self.broken(at, error)?;
                first
            }
        };
        let header = self.reconcile(&first.unwrap_or(last), &last, at)?;
        let table = self.table(&header)?;
        Ok(Some(ZFileMap::new(header, table)))
    }

    /// What header and trailer say together; the trailer counts where they disagree.
    fn reconcile(&mut self, first: &Header, last: &Header, at: u64) -> Result<Header, J::Stop> {
        let reconciled = match zfile::reconcile(first, last, at) {
            Err(error @ zfile::Error::Disagree(_)) => {
                self.broken(0, error)?;
                zfile::reconcile(last, last, at)
            }
            reconciled => reconciled,
        };
        reconciled.map_err(|error| self.fatal(0, error))
    }

    /// The block table. With a wrong checksum, its numbers may fit all the same.
    fn table(&mut self, header: &Header) -> Result<zfile::BlockTable, J::Stop> {
        let offset = self.file_offset(header.extent.table_offset);
        match self.read_table(header) {
            Err(
                error @ Error::ZFile {
                    source: zfile::Error::TableChecksum { .. },
                    ..
                },
            ) => {
                self.judge.broken(offset, error)?;
                let mut unverified = *header;
                unverified.digest = false;
                self.read_table(&unverified)
            }
            table => table,
        }
        .map_err(|error| self.judge.fatal(offset, error))
    }

    fn read_table(&self, header: &Header) -> Result<zfile::BlockTable, Error> {
        let failed = |source| self.error(header.extent.table_offset, source);
        let mut reader = zfile::TableReader::new(header);
        let start = self.file_offset(header.extent.table_offset);
        let len = header.extent.blocks.saturating_mul(4);
        let mut chunk = Vec::new();
        for at in (0..len).step_by(TABLE_CHUNK) {
            let left = len.saturating_sub(at).min(TABLE_CHUNK as u64);
            chunk.resize(left as usize, 0);
            self.blob
                .read_exact_at(&mut chunk, start.saturating_add(at))?;
            reader.read(&chunk).map_err(failed)?;
        }
        reader.finish().map_err(failed)
    }

    /// The structure at byte `at` of the payload, which has room for it.
    fn read(&mut self, at: u64) -> Result<[u8; HEADER_LEN], J::Stop> {
        let mut bytes = [0; HEADER_LEN];
        let offset = self.file_offset(at);
        let read = self.blob.read_exact_at(&mut bytes, offset);
        read.map_err(|error| self.judge.fatal(offset, error.into()))?;
        Ok(bytes)
    }

    /// Notes what is unusual about a structure that was read.
    fn noted(
        &mut self,
        at: u64,
        bytes: &[u8; HEADER_LEN],
        header: Header,
        part: HeaderKind,
    ) -> Result<Header, J::Stop> {
        let offset = self.file_offset(at);
        let reserved = bytes.get(RESERVED).unwrap_or_default();
        if reserved.iter().any(|byte| *byte != 0) {
            let what = format!("{part} with reserved bytes in use, as old tools left it");
            self.judge.note(offset, what)?;
        }
        if !header.digest {
            let what = format!("{part} without digest: damage to it may go unseen");
            self.judge.note(offset, what)?;
        }
        Ok(header)
    }

    /// Byte of the file at which byte `at` of the payload is.
    fn file_offset(&self, at: u64) -> u64 {
        self.payload.offset.saturating_add(at)
    }

    fn broken(&mut self, at: u64, source: zfile::Error) -> Result<(), J::Stop> {
        let (offset, error) = (self.file_offset(at), self.error(at, source));
        self.judge.broken(offset, error)
    }

    fn fatal(&mut self, at: u64, source: zfile::Error) -> J::Stop {
        let (offset, error) = (self.file_offset(at), self.error(at, source));
        self.judge.fatal(offset, error)
    }

    fn error(&self, at: u64, source: zfile::Error) -> Error {
        Error::ZFile {
            layer: self.blob.layer().clone(),
            offset: self.file_offset(at),
            source,
        }
    }
}

/// Byte at which the trailer of the layer in a container starts, also if zeros follow the layer.
///
/// # Errors
/// [`Error::TooShort`] if the container cannot hold a layer, [`Error::Source`] if it cannot be read.
pub fn layer_trailer(container: &Container) -> Result<u64, Error> {
    let last = last_trailer(container)?;
    match container.zfile_map() {
        // A ZFile says how long its content is.
        Some(_) => Ok(last),
        None => padding::layer_trailer(container.blob(), container.payload(), last),
    }
}

/// Byte at which the trailer of the layer starts that fills a container.
///
/// # Errors
/// [`Error::TooShort`] if the container cannot hold a layer.
pub fn last_trailer(container: &Container) -> Result<u64, Error> {
    let header_len = lsmt::HEADER_LEN as u64;
    let last = container.len().checked_sub(header_len);
    last.filter(|at| *at >= header_len)
        .ok_or_else(|| Error::TooShort {
            layer: container.blob().layer().clone(),
            found: container.len(),
        })
}
