//! Finds the data ranges of a sparse layer without an index: all but the holes of its file.

use std::fs::File;
use std::io;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::format::lsmt::{FIRST_DATA, HEADER_LEN};
use crate::units::{Sector, SectorRange};
use crate::writable::extent_map::{Extent, ExtentMap, Place};

/// Enters the data ranges in the first `len` bytes of a sparse file. They are whole blocks of the file system.
///
/// # Errors
/// Those of `lseek(2)`.
pub(super) fn enter_data(data: &File, len: u64, map: &mut ExtentMap) -> io::Result<()> {
    let first = HEADER_LEN as u64;
    let mut at = first;
    while at < len {
        let start = match rustix::fs::seek(data, SeekFrom::Data(at)) {
            Err(Errno::NXIO) => return Ok(()), // only a hole up to the end of the file
            found => found?.max(first),
        };
        let end = rustix::fs::seek(data, SeekFrom::Hole(start))?.min(len);
        let found = SectorRange::of_bytes(&(start..end));
        if found.is_empty() {
            return Ok(()); // only a hole up to `len`
        }
        let on_disk = |sector: Sector| Sector(sector.saturating_since(FIRST_DATA).0);
        let range = SectorRange::new(on_disk(found.start()), on_disk(found.end()));
        map.insert(Extent::new(range, Place::Data(found.start())), |_| ());
        at = end;
    }
    Ok(())
}
