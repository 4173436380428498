//! Parses the wrappers of a blob: `file -> tar member -> ZFile -> layer`.
//!
//! Opening a layer stops at the first damage. `ovbd check` reports damage and continues where possible.
//! Both use this parser, with a different [`Judge`].
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

/// Reserved bytes of a ZFile header. Old tools left them uninitialized; other tools write zeros.
const RESERVED: std::ops::Range<usize> = 89..HEADER_LEN;

/// Bytes of a block table that are read at a time.
const TABLE_CHUNK: usize = 256 * 1024;

/// Decides how the probe continues after a finding. Offsets are bytes of the file.
pub trait Judge {
    /// Error that ends the probe.
    type Stop;

    /// Reports damage that the probe can work around.
    ///
    /// # Errors
    /// An error ends the probe.
    fn broken(&mut self, offset: u64, error: Error) -> Result<(), Self::Stop>;

    /// Reports damage that ends the probe.
    fn fatal(&mut self, offset: u64, error: Error) -> Self::Stop;

    /// Reports something unusual that is not damage.
    ///
    /// # Errors
    /// An error ends the probe.
    fn note(&mut self, offset: u64, what: String) -> Result<(), Self::Stop>;
}

/// Ends the probe at the first damage.
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

impl Container {
    /// Parses the wrappers of a blob and verifies their checksums. Opens no file.
    ///
    /// # Errors
    /// [`Error::Source`] if the blob cannot be read; [`Error::Foreign`], [`Error::Tar`],
    /// [`Error::TarPayload`] and [`Error::ZFile`] for a damaged wrapper or another kind of file.
    pub fn load(blob: Arc<Blob>) -> Result<Self, Error> {
        let container = probe(blob, &mut Strict)?;
        container.blob().map();
        Ok(container)
    }
}

/// Finds the bytes of the layer in a blob.
///
/// # Errors
/// Those of `judge`.
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

/// Finds the payload of the tar wrapper; without one, it is the whole file.
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
    let available = file_len.saturating_sub(offset);
    if len > available {
        let layer = layer();
        let error = Error::TarPayload {
            layer,
            offset,
            len,
            file_len,
        };
        judge.broken(0, error)?;
    }
    let len = len.min(available);
    Ok(tar::Payload { offset, len })
}

/// The probe of a payload that may be a ZFile.
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

    /// Combines header and trailer; uses the trailer where they disagree.
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

    /// Reads the block table. A table with a wrong checksum is damage, and is used if its numbers are
    /// possible.
    fn table(&mut self, header: &Header) -> Result<zfile::BlockTable, J::Stop> {
        let offset = self.file_offset(header.totals.table_offset);
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
        let failed = |source| self.error(header.totals.table_offset, source);
        let mut reader = zfile::TableReader::new(header);
        let start = self.file_offset(header.totals.table_offset);
        let len = header.totals.blocks.saturating_mul(4);
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

    /// Reads the header or trailer at byte `at` of the payload, which ends after it.
    fn read(&mut self, at: u64) -> Result<[u8; HEADER_LEN], J::Stop> {
        let mut bytes = [0; HEADER_LEN];
        let offset = self.file_offset(at);
        let read = self.blob.read_exact_at(&mut bytes, offset);
        read.map_err(|error| self.judge.fatal(offset, error.into()))?;
        Ok(bytes)
    }

    /// Notes what is unusual about a header or trailer that was read.
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
            let what =
                format!("{part} has reserved bytes that are not zero, as old tools wrote it");
            self.judge.note(offset, what)?;
        }
        if !header.digest {
            let what = format!("{part} has no digest: damage to it may go unnoticed");
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

/// Returns the byte of a container at which the trailer of its layer starts, also if zeros follow the layer.
///
/// # Errors
/// [`Error::TooShort`] if the container cannot hold a layer, [`Error::Source`] if it cannot be read.
pub fn layer_trailer(container: &Container) -> Result<u64, Error> {
    let last = last_trailer(container)?;
    match container.zfile_map() {
        // The length of a ZFile's content is known.
        Some(_) => Ok(last),
        None => padding::layer_trailer(container.blob(), container.payload(), last),
    }
}

/// Returns the byte at which the trailer starts of a layer that fills its container.
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
