//! Waits for a layer that a snapshot froze and that is not sealed yet.
//!
//! The process that took the snapshot locks the file until it is sealed, which takes milliseconds. Another
//! disk above the same snapshot waits for the lock: until then, guest data is where the trailer will be,
//! and may look like a trailer.
#![cfg_attr(
    not(test),
    warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)
)]

use std::thread;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::error::Error;
use crate::format::lsmt::HEADER_LEN;
use crate::format::lsmt::writable::decode_data_header;
use crate::source::Blob;

/// Longest wait for a seal, which writes and syncs an index.
const LIMIT: Duration = Duration::from_secs(10);

/// Pause between two attempts at the lock.
const PAUSE: Duration = Duration::from_millis(2);

/// Waits until no process writes to a file that starts with the header of a writable layer. Returns the
/// uuid of that layer, sealed or not; `None` for any other file.
///
/// The file stays locked until [`Blob::unlock`], so that no process can open it for writing while it is
/// loaded. It may have grown during the wait ([`Blob::measured`]).
///
/// # Errors
/// [`Error::Source`] if the file cannot be read or locked, [`Error::InUse`] if another process holds the
/// lock too long.
pub fn wait(blob: &Blob) -> Result<Option<Uuid>, Error> {
    let mut header = [0; HEADER_LEN];
    // Blobs in a registry do not change, and their files are locked for other purposes.
    if blob.layer().file().is_none() || blob.len() < HEADER_LEN as u64 {
        return Ok(None);
    }
    blob.read_exact_at(&mut header, 0)?;
    let Ok((header, _)) = decode_data_header(&header) else {
        return Ok(None);
    };
    let start = Instant::now();
    while !blob.try_lock_shared()? {
        let waited = start.elapsed();
        if waited >= LIMIT {
            let layer = blob.layer().clone();
            return Err(Error::InUse { layer, waited });
        }
        thread::sleep(PAUSE);
    }
    Ok(Some(header.uuid))
}
