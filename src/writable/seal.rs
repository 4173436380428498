//! Seals a writable layer in place: appends its index and a trailer to the data file, which is then a read-only layer.
//!
//! Crash-safe: each step is durable before the next, and an interrupted run can be repeated. Until the trailer is
//! durable the pair is a writable layer; from then on the index file and the journal are ignored.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::files::sync_name;
use super::remove::remove_index_files;
use super::{Error, Paths};
use crate::format::lsmt::writable::{Kind, encode_seal};
use crate::format::lsmt::{HEADER_LEN, Header, MAX_ENTRIES, Mapping};
use crate::units::SECTOR_SIZE;

/// Entries written at a time.
const CHUNK: usize = 65536;

/// Seals the data file `data`. `mappings` describe its content, sorted; its data is durable.
///
/// # Errors
/// [`Error::TooManyEntries`]; [`Error::File`] and [`Error::Bytes`] if the file cannot be written or synced. The file
/// is as before then.
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
    // Behind all data and the leftovers of an interrupted seal: a reader may still use data that is no longer
    // mapped.
    let len = data.metadata().map_err(Error::file("examine", path))?.len();
    let index_offset = len.max(HEADER_LEN as u64).next_multiple_of(SECTOR_SIZE);
    let trailer = Header {
        index_offset,
        index_entries: entries,
        ..header.clone()
    };
    append(
        data,
        path,
        &encode_seal(&trailer, kind),
        index_offset,
        mappings,
    )
    .inspect_err(|_| {
        // The appended bytes take space that may be needed elsewhere.
        let _ = data.set_len(len);
    })
}

/// Appends index and trailer, each durable before the next.
fn append(
    data: &File,
    path: &Path,
    trailer: &[u8],
    index_offset: u64,
    mappings: &[Mapping],
) -> Result<(), Error> {
    let mut at = index_offset;
    for part in mappings.chunks(CHUNK) {
        let bytes: Vec<u8> = part.iter().flat_map(|mapping| mapping.encode()).collect();
        data.write_all_at(&bytes, at)
            .map_err(Error::bytes("write", path, at))?;
        at += bytes.len() as u64;
    }
    let at = at.next_multiple_of(SECTOR_SIZE);
    data.set_len(at).map_err(Error::file("enlarge", path))?;
    data.sync_all().map_err(Error::file("sync", path))?;
    data.write_all_at(trailer, at)
        .map_err(Error::bytes("write", path, at))?;
    data.sync_all().map_err(Error::file("sync", path))
}

/// Removes the index file and the journal of a sealed layer.
///
/// # Errors
/// [`Error::File`] if a file cannot be removed.
pub fn remove_index(paths: &Paths) -> Result<(), Error> {
    remove_index_files(paths)?;
    sync_name(&paths.index)
}
