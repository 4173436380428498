//! Finds the end of a layer that is followed by padding.
//!
//! The size of a block device is a multiple of some unit, so that a layer copied to it ends before the
//! device does. The header of a finished ZFile has the offset of the trailer. Other layers are found by
//! their trailer, if only zeros follow it: other bytes could belong to an older, longer layer.
#![cfg_attr(
    not(test),
    warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)
)]

use super::error::Error;
use crate::format::lsmt;
use crate::format::tar::Payload;
use crate::format::zfile::{self, HEADER_LEN, Header};
use crate::source::Blob;
use crate::units::Sector;

/// Most bytes of padding: volumes are allocated in units of 4 MiB, or a few times that.
const MAX_PADDING: u64 = 64 << 20;

/// Bytes of one read.
const CHUNK: u64 = 1 << 20;

/// Returns the byte of `payload` at which the trailer of its ZFile starts. `first` is the header, if it was
/// readable. If no trailer is found, returns the last offset at which it would fit.
///
/// # Errors
/// [`Error::Source`] if the blob cannot be read.
pub fn zfile_trailer(blob: &Blob, payload: Payload, first: Option<&Header>) -> Result<u64, Error> {
    let last = payload.len.saturating_sub(HEADER_LEN as u64);
    let read =
        |at: u64, bytes: &mut [u8]| blob.read_exact_at(bytes, payload.offset.saturating_add(at));
    let is_trailer = |at: u64| -> Result<bool, Error> {
        let mut bytes = [0; HEADER_LEN];
        read(at, &mut bytes)?;
        Ok(Header::decode(&bytes, zfile::HeaderKind::Trailer).is_ok())
    };
    // Old writers left random bits in the header, so its offset counts only if there is a trailer.
    let declared = first.and_then(Header::trailer_offset);
    if let Some(at) = declared.filter(|at| (HEADER_LEN as u64..last).contains(at))
        && is_trailer(at)?
    {
        return Ok(at);
    }
    let mut bytes = [0; HEADER_LEN];
    read(last, &mut bytes)?;
    if Header::has_magic(&bytes) {
        return Ok(last);
    }
    let Some(end) = end_of_data(blob, payload)? else {
        return Ok(last);
    };
    // The first byte of a trailer is not zero, so that it starts at most its length before `end`.
    let from = end.saturating_sub(HEADER_LEN as u64).max(HEADER_LEN as u64);
    let mut window = vec![0; end.saturating_sub(from) as usize];
    read(from, &mut window)?;
    let start = (0..window.len()).rev();
    let start = start.map(|at| window.get(at..).unwrap_or_default());
    let found = start
        .filter(|rest| Header::has_magic(rest))
        .map(<[u8]>::len);
    for len in found {
        let at = end.saturating_sub(len as u64);
        if at <= last && is_trailer(at)? {
            return Ok(at);
        }
    }
    Ok(last)
}

/// Returns the byte of `payload` at which the trailer of its layer starts: `last`, the last offset at which
/// it fits, or an earlier one if only zeros follow.
///
/// # Errors
/// [`Error::Source`] if the blob cannot be read.
pub fn layer_trailer(blob: &Blob, payload: Payload, last: u64) -> Result<u64, Error> {
    const LEN: usize = lsmt::HEADER_LEN;
    let read = |at: u64| -> Result<[u8; LEN], Error> {
        let mut bytes = [0; LEN];
        blob.read_exact_at(&mut bytes, payload.offset.saturating_add(at))?;
        Ok(bytes)
    };
    if lsmt::Header::has_magic(&read(last)?) {
        return Ok(last);
    }
    let first = lsmt::Header::decode(&read(0)?, lsmt::HeaderKind::Header);
    let end = end_of_data(blob, payload)?;
    let (Ok(first), Some(end)) = (first, end) else {
        return Ok(last);
    };
    // A layer has whole sectors, and only the first sector of a trailer has bytes that are not zero.
    let at = Sector::containing(end.saturating_sub(1)).byte();
    if at > last || at < LEN as u64 {
        return Ok(last);
    }
    let Ok(trailer) = lsmt::Header::decode(&read(at)?, lsmt::HeaderKind::Trailer) else {
        return Ok(last);
    };
    // A truncated layer may contain another layer in its data, whose trailer does not match its header.
    let index_end = trailer.index_entries.checked_mul(lsmt::ENTRY_LEN as u64);
    let index_end = index_end.and_then(|len| len.checked_add(trailer.index_offset));
    let same = (first.uuid, first.parent_uuid, first.virtual_size)
        == (trailer.uuid, trailer.parent_uuid, trailer.virtual_size);
    let adjoins = index_end.is_some_and(|end| Sector::at_or_after(end).checked_byte() == Some(at));
    Ok(if same && adjoins { at } else { last })
}

/// Returns the end of the last byte of `payload` that is not zero, if at most [`MAX_PADDING`] zeros follow it.
fn end_of_data(blob: &Blob, payload: Payload) -> Result<Option<u64>, Error> {
    let stop = payload.len.saturating_sub(MAX_PADDING);
    let mut end = payload.len;
    let mut chunk = Vec::new();
    while end > stop {
        let start = end.saturating_sub(CHUNK).max(stop);
        chunk.resize(end.saturating_sub(start) as usize, 0);
        blob.read_exact_at(&mut chunk, payload.offset.saturating_add(start))?;
        if let Some(at) = chunk.iter().rposition(|byte| *byte != 0) {
            return Ok(Some(start.saturating_add(at as u64).saturating_add(1)));
        }
        end = start;
    }
    Ok(None)
}
