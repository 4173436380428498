//! Waiting for a layer that a snapshot froze and that is not sealed yet.
//!
//! The device that took the snapshot has the file locked until it is a layer, which is a matter of
//! milliseconds. Whoever opens it meanwhile, as another device above the same snapshot, waits: before,
//! what stands where the trailer is to be is data of the guest's, which may look like one.

use std::thread;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::container::Container;
use super::error::Error;
use crate::format::lsmt::HEADER_LEN;
use crate::format::lsmt::writable::decode_data_header;

/// How long sealing may take: an index is written and synced.
const LIMIT: Duration = Duration::from_secs(10);

/// How often to look.
const PAUSE: Duration = Duration::from_millis(2);

/// Waits until nobody writes to a layer that began as a writable one, whether it is sealed or not.
/// Returns the uuid such a layer has; `None`: it is another, and nothing to wait for.
///
/// # Errors
/// The file cannot be read or locked, or somebody writes to it for too long.
pub fn wait(container: &Container) -> Result<Option<Uuid>, Error> {
    let blob = container.blob();
    let mut header = [0; HEADER_LEN];
    if container.is_tar() || container.zfile_map().is_some() || blob.len() < HEADER_LEN as u64 {
        return Ok(None);
    }
    blob.read_exact_at(&mut header, 0)?;
    let Ok((header, _)) = decode_data_header(&header) else {
        return Ok(None);
    };
    let path = || blob.path().to_owned();
    let start = Instant::now();
    loop {
        if blob.try_lock_shared()? {
            return Ok(Some(header.uuid));
        }
        let waited = start.elapsed();
        if waited >= LIMIT {
            return Err(Error::InUse {
                path: path(),
                waited,
            });
        }
        thread::sleep(PAUSE);
    }
}
