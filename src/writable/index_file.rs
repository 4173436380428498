//! The index file of a writable layer: a header, and mappings in the order of arrival.
#![cfg_attr(
    not(test),
    warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)
)]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Error;
use super::files::{sync_name, with_suffix};
use crate::format::lsmt::writable::{decode_index_header, encode_index_header};
use crate::format::lsmt::{ENTRY_LEN, HEADER_LEN, Header, Mapping};
use crate::io::regular::open_regular;

/// Most entries of an index file, as in upstream's program.
pub const MAX_INDEX_ENTRIES: u64 = 128_000_000;

/// Entries read or written at a time.
const CHUNK: usize = 65536;

const FIRST_ENTRY: u64 = HEADER_LEN as u64;
const ENTRY: u64 = ENTRY_LEN as u64;

/// An open index file.
#[derive(Debug)]
pub struct IndexFile {
    path: PathBuf,
    file: Arc<File>,
    /// Number of entries. The next one is written behind them.
    entries: u64,
    /// Number of entries that are never cut off: entries behind the point of [`IndexFile::go_back`] may be durable, and
    /// are written again.
    kept: u64,
    /// Whether the name of the file may not be durable yet.
    name_is_new: bool,
}

impl IndexFile {
    /// Creates an index file without entries. It is complete and durable from the moment it has its name; the name is
    /// not durable yet.
    ///
    /// # Errors
    /// [`Error::File`] and [`Error::Bytes`] if a file of that name exists, or cannot be written.
    pub fn create(path: &Path, header: &Header) -> Result<(), Error> {
        let new = start_new(path, header)?;
        let synced = new.file.sync_all().map_err(Error::file("sync", &new.path));
        // Unlike a rename, this does not replace an existing file.
        let named = synced
            .and_then(|()| fs::hard_link(&new.path, path).map_err(Error::file("create", path)));
        let removed = fs::remove_file(&new.path).map_err(Error::file("remove", &new.path));
        named.and(removed)
    }

    /// Opens an index file. An empty file has neither header nor entries.
    ///
    /// # Errors
    /// [`Error::TooManyEntries`], [`Error::TooShort`], [`Error::Format`]; [`Error::File`] and [`Error::Bytes`] if the
    /// file cannot be read.
    pub fn open(path: &Path, writable: bool) -> Result<(Self, Option<Header>), Error> {
        let mut options = File::options();
        options.read(true).write(writable);
        let file = open_regular(path, options).map_err(Error::file("open", path))?;
        let len = file.metadata().map_err(Error::file("examine", path))?.len();
        let entries = len.saturating_sub(FIRST_ENTRY) / ENTRY;
        check_count(path, entries)?;
        let header = match len {
            0 => None,
            _ => Some(read_header(&file, path, len)?),
        };
        let index = Self {
            path: path.to_owned(),
            file: file.into(),
            entries,
            kept: entries,
            name_is_new: false,
        };
        Ok((index, header))
    }

    /// Returns the path by which it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the file.
    pub(super) fn file(&self) -> Arc<File> {
        self.file.clone()
    }

    /// Returns the offset of the byte after the last entry.
    pub(super) fn end(&self) -> u64 {
        offset_of(self.entries)
    }

    /// Returns the number of entries.
    pub fn entries(&self) -> u64 {
        self.entries
    }

    /// Returns whether another program cut off entries.
    ///
    /// # Errors
    /// [`Error::File`] if the length cannot be read.
    pub fn is_cut_short(&self) -> Result<bool, Error> {
        Ok(self.len()? < self.end())
    }

    /// Calls `each` with all mappings, oldest first. Returns the number of torn entries: entries of zeros, which a power
    /// loss leaves in place of entries that were being written. A partial entry at the end is ignored.
    ///
    /// # Errors
    /// [`Error::Bytes`] if the file cannot be read; [`Error::Entry`] if an entry breaks a rule.
    pub fn replay(&self, mut each: impl FnMut(Mapping)) -> Result<u64, Error> {
        let mut torn = 0_u64;
        let mut first = 0_u64;
        while first < self.entries {
            let count = self.entries.saturating_sub(first).min(CHUNK as u64);
            for (raw, number) in self.read(first, count)?.iter().zip(first..) {
                if *raw == [0; ENTRY_LEN] {
                    torn = torn.saturating_add(1);
                    continue;
                }
                let mapping = Mapping::decode(raw, number).map_err(|source| Error::Entry {
                    path: self.path.clone(),
                    source,
                })?;
                mapping.into_iter().for_each(&mut each);
            }
            first = first.saturating_add(count);
        }
        Ok(torn)
    }

    /// Reads `count` entries from number `first` on.
    fn read(&self, first: u64, count: u64) -> Result<Vec<[u8; ENTRY_LEN]>, Error> {
        // At most `MAX_INDEX_ENTRIES`, which bounds the memory.
        let mut raw = vec![[0; ENTRY_LEN]; count as usize];
        let at = offset_of(first);
        self.file
            .read_exact_at(raw.as_flattened_mut(), at)
            .map_err(Error::bytes("read", &self.path, at))?;
        Ok(raw)
    }

    /// Makes `entry` the number of the next entry, if all entries from there on are the first of `mappings`, which are
    /// then appended again. An entry of zeros matches any mapping, because it was not stored. Returns `false` if another
    /// program wrote the entries.
    ///
    /// # Errors
    /// [`Error::Bytes`] if the file cannot be read.
    pub fn go_back(&mut self, entry: u64, mappings: &[Mapping]) -> Result<bool, Error> {
        let count = self.entries.saturating_sub(entry);
        let own = usize::try_from(count).ok();
        let Some(own) = own.and_then(|count| mappings.get(..count)) else {
            return Ok(false);
        };
        let found = self.read(entry, count)?;
        let is_same = |(found, own): (&[u8; ENTRY_LEN], &Mapping)| {
            *found == [0; ENTRY_LEN] || *found == own.encode()
        };
        let all = found.iter().zip(own).all(is_same);
        if all {
            self.entries = self.entries.min(entry);
        }
        Ok(all)
    }

    /// Makes all written entries durable.
    ///
    /// # Errors
    /// [`Error::File`] if the sync fails.
    pub fn sync(&self) -> Result<(), Error> {
        let synced = self.file.sync_data();
        synced.map_err(Error::file("sync", &self.path))
    }

    /// Appends mappings and makes them durable. After an error the index is as before.
    ///
    /// # Errors
    /// [`Error::TooManyEntries`]; [`Error::File`] and [`Error::Bytes`] if the file cannot be written or synced.
    pub fn append(&mut self, mappings: &[Mapping]) -> Result<(), Error> {
        self.sync_new_name()?;
        check_count(
            &self.path,
            self.entries.saturating_add(mappings.len() as u64),
        )?;
        let written = self.write(mappings.iter().copied());
        match written.and_then(|entries| self.sync().map(|()| entries)) {
            Ok(entries) => {
                self.entries = entries;
                self.kept = self.kept.max(entries);
                Ok(())
            }
            Err(error) => {
                // If this fails too, later entries overwrite these.
                let _ = self.trim();
                Err(error)
            }
        }
    }

    /// Cuts off what follows the last entry.
    ///
    /// # Errors
    /// [`Error::File`] if the file cannot be truncated.
    pub fn trim(&self) -> Result<(), Error> {
        let end = offset_of(self.entries.max(self.kept));
        // A truncation would also release the space that is reserved behind the end.
        match self.len()? > end {
            true => self.file.set_len(end),
            false => Ok(()),
        }
        .map_err(Error::file("truncate", &self.path))
    }

    fn len(&self) -> Result<u64, Error> {
        let metadata = self.file.metadata();
        let metadata = metadata.map_err(Error::file("examine", &self.path))?;
        Ok(metadata.len())
    }

    /// Replaces the file by one with these mappings, durably.
    ///
    /// # Errors
    /// [`Error::File`] and [`Error::Bytes`] if the new file cannot be written or renamed; then the old one stays. Or if
    /// the new name cannot be synced; then the new file is used, and the next change tries to sync the name again.
    pub fn replace(
        &mut self,
        header: &Header,
        mappings: impl Iterator<Item = Mapping>,
    ) -> Result<(), Error> {
        let mut new = start_new(&self.path, header)?;
        let replaced = new.write(mappings).and_then(|entries| {
            new.entries = entries;
            new.file
                .sync_all()
                .map_err(Error::file("sync", &new.path))?;
            fs::rename(&new.path, &self.path).map_err(Error::file("replace", &self.path))
        });
        if let Err(error) = replaced {
            // The new file takes space that may be needed elsewhere.
            let _ = fs::remove_file(&new.path);
            return Err(error);
        }
        (self.file, self.entries, self.kept) = (new.file, new.entries, new.entries);
        self.name_is_new = true;
        self.sync_new_name()
    }

    fn sync_new_name(&mut self) -> Result<(), Error> {
        if self.name_is_new {
            sync_name(&self.path)?;
            self.name_is_new = false;
        }
        Ok(())
    }

    /// Writes mappings behind the last entry; returns the new number of entries.
    fn write(&self, mappings: impl Iterator<Item = Mapping>) -> Result<u64, Error> {
        let mut entries = self.entries;
        let mut raw = Vec::new();
        let mut mappings = mappings.peekable();
        while mappings.peek().is_some() {
            raw.clear();
            raw.extend(mappings.by_ref().take(CHUNK).map(Mapping::encode));
            let at = offset_of(entries);
            let written = self.file.write_all_at(raw.as_flattened(), at);
            written.map_err(Error::bytes("write", &self.path, at))?;
            entries = entries.saturating_add(raw.len() as u64);
        }
        Ok(entries)
    }

    /// Replaces the header, for a disk of another size, durably.
    ///
    /// # Errors
    /// [`Error::Bytes`] and [`Error::File`] if it cannot be written or synced.
    pub fn set_header(&self, header: &Header) -> Result<(), Error> {
        let written = self.file.write_all_at(&encode_index_header(header), 0);
        written.map_err(Error::bytes("write", &self.path, 0))?;
        self.sync()
    }
}

/// The byte at which entry number `entry` starts.
fn offset_of(entry: u64) -> u64 {
    // Exact for all numbers up to `MAX_INDEX_ENTRIES`.
    FIRST_ENTRY.saturating_add(entry.saturating_mul(ENTRY))
}

fn check_count(path: &Path, entries: u64) -> Result<(), Error> {
    match entries > MAX_INDEX_ENTRIES {
        true => Err(Error::TooManyEntries {
            path: path.to_owned(),
            entries,
            most: MAX_INDEX_ENTRIES,
        }),
        false => Ok(()),
    }
}

/// Reads the header of a file of `len` bytes.
fn read_header(file: &File, path: &Path, len: u64) -> Result<Header, Error> {
    if len < FIRST_ENTRY {
        return Err(Error::TooShort {
            path: path.to_owned(),
            expected: "index file",
            found: len,
        });
    }
    let mut bytes = [0; HEADER_LEN];
    let read = file.read_exact_at(&mut bytes, 0);
    read.map_err(Error::bytes("read the header", path, 0))?;
    decode_index_header(&bytes).map_err(|source| Error::Format {
        path: path.to_owned(),
        expected: "index file",
        source,
    })
}

/// A new index file without entries, under a temporary name beside `path`.
fn start_new(path: &Path, header: &Header) -> Result<IndexFile, Error> {
    let path = with_suffix(path, "new");
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(true);
    let file = open_regular(&path, options).map_err(Error::file("create", &path))?;
    if let Err(error) = file.write_all_at(&encode_index_header(header), 0) {
        let _ = fs::remove_file(&path);
        return Err(Error::bytes("write", &path, 0)(error));
    }
    Ok(IndexFile {
        path,
        file: file.into(),
        entries: 0,
        kept: 0,
        name_is_new: false,
    })
}
