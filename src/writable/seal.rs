//! Sealing a writable layer in place: appends its index and a trailer to the data file, which is a
//! read-only layer from then on.
//!
//! Crash-safe: each step is durable before the next, and an interrupted run can be repeated. Until the
//! trailer is durable the pair is a writable layer; from then on the index file and the journal are
//! ignored.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::files::{remove_file, sync_name};
use super::{Error, Paths, journal};
use crate::format::lsmt::writable::{Kind, encode_seal};
use crate::format::lsmt::{HEADER_LEN, Header, MAX_ENTRIES, Mapping};
use crate::units::SECTOR_SIZE;

/// Entries written at a time.
const CHUNK: usize = 65536;

/// Seals the data file `data` of a layer whose content `mappings` tell, in order, and whose data is
/// durable.
///
/// # Errors
/// The file cannot be written, or not be made durable, or its index would have more entries than
/// can be read. It then is as it was.
pub fn seal(
    data: &File,
    path: &Path,
    header: &Header,
    kind: Kind,
    mappings: &[Mapping],
) -> Result<(), Error> {
    let entries = mappings.len() as u64;
    if entries > MAX_ENTRIES {
        return Err(Error::TooManyEntries {
            path: path.to_owned(),
            entries,
            most: MAX_ENTRIES,
        });
    }
    // Behind everything, even what an earlier try left: a reader may still use data that no longer
    // counts.
    let len = data.metadata().map_err(Error::file("examine", path))?.len();
    let index_offset = len.max(HEADER_LEN as u64).next_multiple_of(SECTOR_SIZE);
    let sealed = append(data, path, header, kind, mappings, index_offset);
    if sealed.is_err() {
        // It may take the very space that is missing.
        let _ = data.set_len(len);
    }
    sealed
}

/// Writes index and trailer, each durable before what comes next.
fn append(
    data: &File,
    path: &Path,
    header: &Header,
    kind: Kind,
    mappings: &[Mapping],
    index_offset: u64,
) -> Result<(), Error> {
    let mut at = index_offset;
    for part in mappings.chunks(CHUNK) {
        let bytes: Vec<u8> = part.iter().flat_map(|mapping| mapping.encode()).collect();
        data.write_all_at(&bytes, at)
            .map_err(Error::bytes("write", path, at))?;
        at += bytes.len() as u64;
    }
    let trailer = Header {
        index_offset,
        index_entries: mappings.len() as u64,
        ..header.clone()
    };
    let at = at.next_multiple_of(SECTOR_SIZE);
    data.set_len(at).map_err(Error::file("enlarge", path))?;
    data.sync_all().map_err(Error::file("sync", path))?;
    data.write_all_at(&encode_seal(&trailer, kind), at)
        .map_err(Error::bytes("write", path, at))?;
    data.sync_all().map_err(Error::file("sync", path))
}

/// Removes the index file and the journal of a sealed layer.
///
/// # Errors
/// A file that is there cannot be removed.
pub fn remove_index(paths: &Paths) -> Result<(), Error> {
    journal::remove(&paths.index)?;
    // The index file last: while it exists, the next start removes the rest.
    remove_file(&paths.index)?;
    sync_name(&paths.index)
}
