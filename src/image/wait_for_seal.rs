//! Waiting for a layer that a snapshot froze and that is not sealed yet.
//!
//! The process that took the snapshot holds a lock on the file until it is sealed, which takes
//! milliseconds. Another disk above the same snapshot waits for that: until then, guest data lies where
//! the trailer will be, and may look like one.
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

/// How long sealing may take: an index is written and synced.
const LIMIT: Duration = Duration::from_secs(10);

/// How often to look.
const PAUSE: Duration = Duration::from_millis(2);

/// Waits until no process writes to a file that began as a writable layer, whether it is sealed by
/// then or not. Returns the uuid of such a layer; `None`: the file began as something else.
///
/// The file of such a layer is locked until [`Blob::unlock`], so that no process can begin to write
/// to it while it is loaded. It may have grown meanwhile ([`Blob::measured`]).
///
/// # Errors
/// [`Error::Source`] if the file cannot be read or locked, [`Error::InUse`] if a process goes on
/// writing to it.
pub fn wait(blob: &Blob) -> Result<Option<Uuid>, Error> {
    let mut header = [0; HEADER_LEN];
    // Blobs of a registry do not change, and their files are locked for other reasons.
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
