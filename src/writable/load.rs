//! Reads the files of a writable layer that is not in use, whichever program wrote them.
//!
//! Upstream refuses some of these files, or guesses. This module relies on two facts: an index entry that points past
//! the end of the data file was never durable, so it is dropped; a sparse layer without an index consists of the data
//! ranges of its file, so its holes replace the index.
#![cfg_attr(
    not(test),
    warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)
)]

mod holes;
mod resize;

use std::fs::{File, TryLockError};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use super::extent_map::{Extent, ExtentMap, Place, mappings, sparse_place};
use super::files::sync_names;
use super::index_file::IndexFile;
use super::journal::{self, IndexPosition, Journal};
use super::seal;
use super::{Error, Paths};
use crate::format::lsmt::writable::{Kind, decode_data_header, encode_data_header};
use crate::format::lsmt::{FIRST_DATA, HEADER_LEN, Header, HeaderKind, Mapping};
use crate::io::file_lock::{LockKind, lock_within};
use crate::io::regular::{open_regular, open_to_read};
use crate::ratelimited_log;
use crate::source::Blob;
use crate::units::{Sector, SectorRange};

pub use resize::resize;

/// How long to wait for another process that has the files open.
const LOCK_LIMIT: Duration = Duration::from_millis(500);

/// How the files are opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// To read them, together with other readers.
    Read,
    /// To write them, as the only process.
    Write,
}

/// How the index file describes the layer. Each state includes what the ones before it lack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum IndexState {
    /// It agrees with the map.
    Current,
    /// It has torn entries, which are dropped.
    Torn,
    /// It misses mappings, or has entries without data, which become wrong once the data file grows.
    Misleading,
    /// It is empty; the holes of the data file replace it.
    Holes,
}

/// The open files of a writable layer, and what they hold.
#[derive(Debug)]
pub struct LoadedLayer {
    data: File,
    index: IndexFile,
    /// The header of the data file.
    header: Header,
    kind: Kind,
    map: ExtentMap,
    /// Mappings of the journal, which are part of the map. The index ends where the first of them is to be appended.
    journal: Vec<Mapping>,
    /// Number of the first of them.
    next: u64,
    index_state: IndexState,
    /// Whether the journal has mappings without data, which become wrong once the data file grows.
    journal_misleads: bool,
}

/// What a [`LoadedLayer`] consists of, for a layer that is opened to write to it.
#[derive(Debug)]
pub(super) struct LayerParts {
    /// Locked.
    pub data: File,
    pub index: IndexFile,
    pub header: Header,
    pub kind: Kind,
    pub map: ExtentMap,
    pub journal: Vec<Mapping>,
}

/// Opens the files of a layer and reads its extents into `map`, an empty one.
///
/// # Errors
/// [`Error::Busy`] if another process has the files open; [`Error::TooShort`], [`Error::Format`], [`Error::Entry`],
/// [`Error::TooManyEntries`], [`Error::NoPair`] and [`Error::Misplaced`] if they are not the files of a writable layer;
/// [`Error::Sealed`]; [`Error::JournalVersion`]; [`Error::File`] and [`Error::Bytes`] if they cannot be read.
pub fn load(paths: &Paths, access: Access, map: ExtentMap) -> Result<LoadedLayer, Error> {
    let path = &paths.data;
    let mut options = File::options();
    options.read(true).write(access == Access::Write);
    let data = open_regular(path, options).map_err(Error::file("open", path))?;
    lock(&data, path, access)?;
    let len = data.metadata().map_err(Error::file("examine", path))?.len();
    let (header, kind) = read_header(&data, path, len)?;
    if is_sealed(&data, len, &header) {
        return Err(Error::Sealed { path: path.clone() });
    }
    let (index, index_state) = open_index(paths, access, kind, &header)?;
    let mut loaded = LoadedLayer {
        data,
        index,
        header,
        kind,
        map,
        journal: Vec::new(),
        next: 0,
        index_state,
        journal_misleads: false,
    };
    if index_state == IndexState::Holes {
        loaded.map_holes(path, len)?;
    }
    let file_end = Sector::containing(len);
    let journal = loaded.find_journal(paths)?;
    loaded.replay_index(paths, file_end)?;
    loaded.replay_journal(journal, file_end);
    if access == Access::Write {
        check_places(&loaded)?;
        // The process that created or replaced a file may have died before it synced the name, and what is
        // flushed from now on must not be lost with a name.
        sync_names(paths)?;
    }
    Ok(loaded)
}

/// Opens the index file of the layer with this header.
fn open_index(
    paths: &Paths,
    access: Access,
    kind: Kind,
    header: &Header,
) -> Result<(IndexFile, IndexState), Error> {
    let (index, index_header) = IndexFile::open(&paths.index, access == Access::Write)?;
    match index_header {
        Some(found) if found.uuid != header.uuid => Err(Error::NoPair {
            data: paths.data.clone(),
            index: paths.index.clone(),
        }),
        None if kind != Kind::Sparse => Err(Error::TooShort {
            path: paths.index.clone(),
            expected: "index file",
            found: 0,
        }),
        None => Ok((index, IndexState::Holes)),
        Some(_) => Ok((index, IndexState::Current)),
    }
}

impl LoadedLayer {
    /// Returns the header of the data file.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Returns how data is placed.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Returns the extents.
    pub fn map(&self) -> &ExtentMap {
        &self.map
    }

    /// Returns the index file.
    pub fn index(&self) -> &IndexFile {
        &self.index
    }

    /// Returns the number of mappings in the journal, which are part of the map.
    pub fn journal_len(&self) -> usize {
        self.journal.len()
    }

    /// Returns the data file, to read it. The blob shares the lock of the layer.
    ///
    /// # Errors
    /// [`Error::File`] and [`Error::Blob`] if the process has no descriptor left or the file cannot be examined.
    pub fn data_blob(&self, paths: &Paths) -> Result<Blob, Error> {
        let path = &paths.data;
        let data = self.data.try_clone().map_err(Error::file("open", path))?;
        Ok(Blob::changing(path, data)?)
    }

    /// Returns whether the index file disagrees with the map: it is empty, or has entries that do not count.
    pub fn index_is_stale(&self) -> bool {
        self.index_state > IndexState::Current
    }

    /// Returns whether the index must be rewritten before anything else is written: index or journal become wrong once
    /// the data file grows, or the index is empty.
    pub(super) fn must_rewrite_index(&self) -> bool {
        self.journal_misleads || self.index_state >= IndexState::Misleading
    }

    /// Gives a layer whose header has no size the size `size`, in bytes.
    ///
    /// # Errors
    /// [`Error::Bytes`] if the header cannot be written.
    pub(super) fn set_size(&mut self, paths: &Paths, size: u64) -> Result<(), Error> {
        self.header.virtual_size = size;
        self.write_data_header(paths)?;
        self.distrust_index(IndexState::Misleading);
        Ok(())
    }

    /// Continues a journal whose mappings may not be in the index; else starts a new one.
    ///
    /// # Errors
    /// Those of [`Journal::start`].
    pub(super) fn open_journal(&self, paths: &Paths) -> Result<Journal, Error> {
        let (uuid, boot) = (self.header.uuid, journal::boot_id());
        let entries = self.index.entries();
        match self.journal.is_empty() {
            true => Journal::start(&paths.index, uuid, boot, entries),
            false => {
                let position = IndexPosition {
                    next: self.next,
                    entries: Some(entries),
                };
                Journal::resume(&paths.index, uuid, boot, position)
            }
        }
    }

    /// Seals the data file, of a layer opened for writing. Returns the number of mappings.
    ///
    /// # Errors
    /// As [`seal::seal`]; [`Error::File`] and [`Error::Bytes`] if a wrong index cannot be rewritten first.
    pub fn seal(mut self, paths: &Paths) -> Result<usize, Error> {
        self.repair_index(paths)?;
        let mappings: Vec<_> = mappings(&self.map).collect();
        seal::seal(&self.data, &paths.data, &self.header, self.kind, &mappings)?;
        Ok(mappings.len())
    }

    /// Takes the layer apart.
    pub(super) fn into_parts(self) -> LayerParts {
        LayerParts {
            data: self.data,
            index: self.index,
            header: self.header,
            kind: self.kind,
            map: self.map,
            journal: self.journal,
        }
    }

    fn distrust_index(&mut self, state: IndexState) {
        self.index_state = self.index_state.max(state);
    }

    /// Writes the header to the data file; it is not durable yet.
    fn write_data_header(&self, paths: &Paths) -> Result<(), Error> {
        let header = encode_data_header(&self.header, self.kind);
        let written = self.data.write_all_at(&header, 0);
        written.map_err(Error::bytes("write", &paths.data, 0))
    }

    /// Rewrites an index that misleads, durably, and empties the journal. Must come before the data file grows: a wrong
    /// entry would get the appended bytes as its data.
    fn repair_index(&mut self, paths: &Paths) -> Result<(), Error> {
        // Holes do not mislead.
        if !self.must_rewrite_index() || self.index_state == IndexState::Holes {
            return Ok(());
        }
        let synced = self.data.sync_all();
        synced.map_err(Error::file("sync", &paths.data))?;
        self.index.replace(&self.header, mappings(&self.map))?;
        journal::remove(&paths.index)?;
        self.journal.clear();
        (self.index_state, self.journal_misleads) = (IndexState::Current, false);
        Ok(())
    }

    /// Enters the data ranges of a sparse data file of `len` bytes.
    fn map_holes(&mut self, path: &Path, len: u64) -> Result<(), Error> {
        // An interrupted seal leaves bytes beyond the disk.
        let disk = SectorRange::new(Sector(0), Sector::at_or_after(self.header.virtual_size));
        let end = FIRST_DATA.checked_add(disk.len());
        let end = end
            .and_then(Sector::checked_byte)
            .map_or(len, |end| end.min(len));
        holes::enter_data(&self.data, end, &mut self.map).map_err(Error::file("scan", path))
    }

    /// Reads the journal, and makes the index end where the mappings of the journal begin. Returns the valid mappings.
    fn find_journal(&mut self, paths: &Paths) -> Result<Vec<Mapping>, Error> {
        let found = journal::read(&paths.index, self.header.uuid, journal::boot_id())?;
        let (numbers, mappings): (Vec<_>, Vec<_>) = found.mappings.iter().copied().unzip();
        let Some(first) = numbers.first() else {
            return Ok(mappings);
        };
        self.next = *first;
        let Some(entry) = found.first_entry() else {
            // The index was being rewritten: it may hold any of them.
            return Ok(mappings);
        };
        if entry > self.index.entries() {
            // Another program truncated the index.
            self.distrust_index(IndexState::Misleading);
        } else if !self.index.go_back(entry, &mappings)? {
            ratelimited_log::warn(format_args!(
                "{}: another program changed the index since the journal was written; dropped {} mappings that \
                 were not flushed",
                paths.index.display(),
                mappings.len()
            ));
            return Ok(Vec::new());
        }
        Ok(mappings)
    }

    /// Enters the mappings of the index.
    fn replay_index(&mut self, paths: &Paths, file_end: Sector) -> Result<(), Error> {
        let mut without_data = 0_u64;
        let (map, index) = (&mut self.map, &self.index);
        let torn = index.replay(|mapping| match has_data(&mapping, file_end) {
            true => enter(map, mapping),
            false => without_data = without_data.saturating_add(1),
        })?;
        if torn > 0 || without_data > 0 {
            ratelimited_log::warn(format_args!(
                "{}: dropped {torn} torn entries and {without_data} entries that point past the end of {}; their \
                 data was never flushed",
                paths.index.display(),
                paths.data.display()
            ));
            self.distrust_index(match without_data {
                0 => IndexState::Torn,
                _ => IndexState::Misleading,
            });
        }
        Ok(())
    }

    /// Enters the mappings of the journal.
    fn replay_journal(&mut self, found: Vec<Mapping>, file_end: Sector) {
        let count = found.len();
        self.journal = found;
        self.journal.retain(|mapping| has_data(mapping, file_end));
        self.journal_misleads = self.journal.len() < count;
        for mapping in &self.journal {
            enter(&mut self.map, *mapping);
        }
    }
}

/// Locks the data file: shared to read, exclusively to write. Waits, because a killed process holds its lock for a
/// moment.
fn lock(data: &File, path: &Path, access: Access) -> Result<(), Error> {
    let lock = match access {
        Access::Read => LockKind::Shared,
        Access::Write => LockKind::Exclusive,
    };
    lock_within(data, lock, LOCK_LIMIT).map_err(|error| match error {
        TryLockError::WouldBlock => Error::Busy {
            path: path.to_owned(),
        },
        TryLockError::Error(source) => Error::file("lock", path)(source),
    })
}

/// Reads the header of a data file of `len` bytes.
pub(super) fn read_header(data: &File, path: &Path, len: u64) -> Result<(Header, Kind), Error> {
    if len < HEADER_LEN as u64 {
        return Err(Error::TooShort {
            path: path.to_owned(),
            expected: "data file",
            found: len,
        });
    }
    let mut bytes = [0; HEADER_LEN];
    data.read_exact_at(&mut bytes, 0)
        .map_err(Error::bytes("read the header", path, 0))?;
    let decoded = decode_data_header(&bytes);
    decoded.map_err(|source| Error::Format {
        path: path.to_owned(),
        expected: "data file",
        source,
    })
}

/// Returns whether the pair of a frozen layer is not sealed yet: its index file exists, and its data file has no
/// trailer. `false` for files that cannot be read.
pub fn waits_for_seal(paths: &Paths) -> bool {
    let unsealed = || {
        let data = open_to_read(&paths.data).ok()?;
        let len = data.metadata().ok()?.len();
        let (header, _) = read_header(&data, &paths.data, len).ok()?;
        Some(!is_sealed(&data, len, &header))
    };
    paths.index.exists() && unsealed().unwrap_or(false)
}

/// Returns whether the file ends with the trailer of this layer. The uuid distinguishes a trailer from guest data that
/// looks like one.
pub(super) fn is_sealed(data: &File, len: u64, header: &Header) -> bool {
    let mut bytes = [0; HEADER_LEN];
    let Some(at) = len.checked_sub(HEADER_LEN as u64) else {
        return false;
    };
    let trailer = data.read_exact_at(&mut bytes, at).ok();
    let trailer = trailer.and_then(|()| Header::decode(&bytes, HeaderKind::Trailer).ok());
    trailer.is_some_and(|trailer| !header.uuid.is_nil() && trailer.uuid == header.uuid)
}

/// Whether a file that ends at `file_end` has the data of a mapping.
fn has_data(mapping: &Mapping, file_end: Sector) -> bool {
    let start = mapping.moffset();
    let data = SectorRange::checked(start, mapping.range().len());
    mapping.is_zeroed() || (start >= FIRST_DATA && data.is_some_and(|data| data.end() <= file_end))
}

fn enter(map: &mut ExtentMap, mapping: Mapping) {
    let place = match mapping.is_zeroed() {
        true => Place::Zero,
        false => Place::Data(mapping.moffset()),
    };
    let range = mapping.range();
    map.insert(Extent::new(range, place), |_| ());
}

/// Fails if data of the layer cannot be overwritten in place.
fn check_places(loaded: &LoadedLayer) -> Result<(), Error> {
    let misplaced = |extent: &Extent, data: SectorRange| Error::Misplaced {
        path: loaded.index.path().to_owned(),
        offset: extent.start(),
        moffset: data.start(),
    };
    let with_data = |extent: Extent| Some((extent.data()?, extent));
    let mut places: Vec<_> = loaded.map.iter().filter_map(with_data).collect();
    if loaded.kind == Kind::Sparse {
        let is_moved =
            |(data, extent): &&(SectorRange, Extent)| *data != sparse_place(extent.range());
        let found = places.iter().find(is_moved);
        return found.map_or(Ok(()), |(data, extent)| Err(misplaced(extent, *data)));
    }
    places.sort_unstable_by_key(|(data, _)| data.start());
    let shared = places.windows(2).find_map(|pair| match pair {
        [(one, _), (next, extent)] if one.overlaps(*next) => Some(misplaced(extent, *next)),
        _ => None,
    });
    shared.map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::writable::create;

    #[test]
    fn data_beyond_a_sparse_disk_is_not_part_of_it() {
        let folder = tempfile::tempdir().unwrap();
        let paths = Paths {
            data: folder.path().join("data"),
            index: folder.path().join("index"),
        };
        let header = Header::empty(1 << 20, Uuid::new_v4(), Uuid::nil());
        create(&paths, Kind::Sparse, &header).unwrap();
        let data = File::options().write(true).open(&paths.data).unwrap();
        // As after a seal that was interrupted, behind a hole up to the end of the disk.
        data.write_all_at(&[1; 4096], 2 << 20).unwrap();
        let loaded = load(&paths, Access::Read, ExtentMap::new()).unwrap();
        assert!(loaded.index_state == IndexState::Holes && loaded.map.is_empty());
    }
}
