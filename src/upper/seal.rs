//! Finishing a writable layer in place: its index and a trailer are appended to the data file, which
//! from then on is a layer like any other.
//!
//! Each step is durable before the next, and all can be done again after a crash in between: until
//! the trailer is there the pair is a writable layer, and from then on the index file and the journal
//! mean nothing.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::flush::mappings;
use super::log::sync_folder_of;
use super::map::ExtentMap;
use super::{Error, Paths, Upper, journal};
use crate::format::lsmt::writable::{Kind, encode_seal};
use crate::format::lsmt::{HEADER_LEN, Header};
use crate::units::SECTOR_SIZE;

/// Entries written at a time.
const CHUNK: usize = 65536;

/// Seals the data file `data` of a layer whose content `map` tells and whose data is durable.
///
/// # Errors
/// The file cannot be written, or not be made durable.
pub fn seal(
    data: &File,
    path: &Path,
    header: &Header,
    kind: Kind,
    map: &ExtentMap,
) -> Result<(), Error> {
    // Behind everything, even what an earlier try left: somebody may still be reading data that no
    // longer counts.
    let len = data.metadata().map_err(Error::file("examine", path))?.len();
    let index_offset = len.max(HEADER_LEN as u64).next_multiple_of(SECTOR_SIZE);
    let (mut at, mut entries, mut bytes) = (index_offset, 0, Vec::new());
    let mut mappings = mappings(map).peekable();
    while mappings.peek().is_some() {
        bytes.clear();
        for mapping in mappings.by_ref().take(CHUNK) {
            bytes.extend_from_slice(&mapping.encode());
            entries += 1;
        }
        data.write_all_at(&bytes, at)
            .map_err(Error::bytes("write", path, at))?;
        at += bytes.len() as u64;
    }
    let trailer = Header {
        index_offset,
        index_entries: entries,
        ..header.clone()
    };
    let at = at.next_multiple_of(SECTOR_SIZE);
    data.set_len(at).map_err(Error::file("enlarge", path))?;
    data.sync_all().map_err(Error::file("sync", path))?;
    data.write_all_at(&encode_seal(&trailer, kind), at)
        .map_err(Error::bytes("write", path, at))?;
    data.sync_all().map_err(Error::file("sync", path))
}

/// Removes what a sealed layer does not need any more: its index file and its journal.
///
/// # Errors
/// A file that is there cannot be removed.
pub fn remove_index(paths: &Paths) -> Result<(), Error> {
    let [first, second] = journal::paths(&paths.index);
    // The index last: while it is there, somebody knows that there is something to remove.
    for path in [&first, &second, &paths.index] {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::file("remove", path)(error));
            }
            _ => {}
        }
    }
    sync_folder_of(&paths.index)
}

impl Upper {
    /// Seals the layer, to which nobody writes any more: it is frozen, or not served.
    ///
    /// # Errors
    /// It cannot be made durable, or the files not be written or removed.
    pub fn seal(&self) -> Result<(), Error> {
        self.flush()?;
        let state = self.state();
        seal(
            &self.file,
            &self.paths.data,
            &self.header,
            self.kind,
            &state.map,
        )?;
        drop(state);
        remove_index(&self.paths)
    }
}
