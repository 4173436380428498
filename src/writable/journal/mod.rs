//! Mappings that were answered for but are not in the index yet.
//!
//! A mapping must not enter the index before its data is durable, and only a flush makes it so. But a
//! write that was answered must outlive the process: the guest goes on when a new process takes over.
//! So mappings wait in a journal. It is valid for one boot of the kernel, because the page cache that
//! keeps it keeps the data as well. After a power loss only the index counts.
//!
//! Mappings are numbered. There are two files: while a flush makes durable what one holds, new mappings
//! go to the other. After a flush that failed, one file may hold mappings that the index has and
//! mappings that it has not. What tells them apart is the [`IndexPosition`], a record of its own: the
//! index holds all mappings before number `next`, and mapping `next` becomes entry `entries`. Each file
//! begins with a position, and each flush that succeeds adds one. If it cannot be added, an older
//! position still tells the same: every later mapping has its place behind the one before.
//!
//! Neither file is ever synced. `docs/format.md` has their layout.

mod format;

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use uuid::Uuid;
use zerocopy::{FromBytes, IntoBytes};

use super::Error;
use super::files::{remove_file, with_suffix};
use crate::format::lsmt::Mapping;
use crate::io::boot;
use crate::io::regular::{open_regular, open_to_read};
pub use format::IndexPosition;
use format::{Contents, Head, Record, is_other_version};

/// Bytes before the records. An empty file keeps them, so that its first records find room.
const HEAD_LEN: u64 = size_of::<Head>() as u64;

/// Most bytes of a journal file. Files grow to that only if they cannot be emptied.
const MAX_LEN: u64 = 256 << 20;

/// The journal of one writable layer.
#[derive(Debug)]
pub struct Journal {
    files: [(PathBuf, File); 2],
    head: Head,
    /// Which of the files takes new records.
    active: usize,
    /// Bytes of the active file that count.
    end: u64,
    /// Number of the next mapping.
    next: u64,
    position: IndexPosition,
    /// Whether the other file may hold records.
    other_in_use: bool,
    /// Whether the active file may have bytes behind `end`, which could not be cut off yet.
    unclean: bool,
}

/// The paths of the two files that go with an index file.
pub fn paths(index: &Path) -> [PathBuf; 2] {
    ["journal0", "journal1"].map(|suffix| with_suffix(index, suffix))
}

/// Removes the files that exist. The file with the older records goes first: the newer records alone
/// say what all together say; the older ones alone would take newer data back.
///
/// # Errors
/// A file cannot be read or removed.
pub fn remove(index: &Path) -> Result<(), Error> {
    oldest_first(index)?
        .iter()
        .try_for_each(|path| remove_file(path))
}

/// The paths of the files that exist, whatever they hold, the one with the older records first.
fn oldest_first(index: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut files = Vec::new();
    for path in paths(index) {
        let first = match open_to_read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            opened => {
                let file = opened.map_err(Error::file("open", &path))?;
                let bytes = read_bytes(&path, &file)?;
                let head = Head::read_from_prefix(&bytes).ok();
                head.and_then(|(head, _)| Contents::read(&bytes, &head).first)
            }
        };
        files.push((first, path));
    }
    files.sort();
    Ok(files.into_iter().map(|(_, path)| path).collect())
}

/// The id of this boot of the kernel, as text. Where the kernel does not tell, one that no other
/// process has, so that no journal outlives its process.
pub fn boot_id() -> [u8; 36] {
    static ID: OnceLock<Uuid> = OnceLock::new();
    let id = ID.get_or_init(|| match boot::boot_id() {
        unknown if unknown.is_nil() => Uuid::new_v4(),
        known => known,
    });
    let mut text = [0; 36];
    id.hyphenated().encode_lower(&mut text);
    text
}

/// What the journal of a layer holds.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Mappings that the index need not hold, with their numbers, the oldest first.
    pub mappings: Vec<(u64, Mapping)>,
    /// How far the index had got.
    pub position: Option<IndexPosition>,
}

impl Found {
    /// The index entry that the first mapping is, or is to become. `None` if that is not known.
    pub fn first_entry(&self) -> Option<u64> {
        let (first, _) = self.mappings.first()?;
        let position = self.position?;
        position
            .entries?
            .checked_add(first.checked_sub(position.next)?)
    }
}

/// Reads the journal of a layer.
///
/// # Errors
/// A file exists but cannot be read, or is in the format of another version.
pub fn read(index: &Path, uuid: Uuid, boot: [u8; 36]) -> Result<Found, Error> {
    let head = Head::new(uuid, boot);
    let mut parts = Vec::new();
    for path in paths(index) {
        match open_to_read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            opened => {
                let file = opened.map_err(Error::file("open", &path))?;
                parts.push(read_file(&path, &file, &head)?);
            }
        }
    }
    parts.sort_by_key(|part| part.first);
    Ok(found(&parts))
}

/// What the contents of the files, the older one first, say together.
fn found(parts: &[Contents]) -> Found {
    let positions = parts.iter().flat_map(|part| &part.positions);
    // A file may have begun with a copy of a position before a newer one got into the other. Where two
    // differ in the entry alone, the index may have been written anew, and the entry is not known.
    let position = positions.max_by_key(|position| (position.next, position.entries.is_none()));
    let next = position.map_or(0, |position| position.next);
    let mappings = parts.iter().flat_map(|part| &part.mappings);
    Found {
        mappings: mappings
            .filter(|(number, _)| *number >= next)
            .copied()
            .collect(),
        position: position.copied(),
    }
}

fn read_bytes(path: &Path, file: &File) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    file.take(MAX_LEN)
        .read_to_end(&mut bytes)
        .map_err(Error::file("read", path))?;
    Ok(bytes)
}

fn read_file(path: &Path, file: &File, head: &Head) -> Result<Contents, Error> {
    let bytes = read_bytes(path, file)?;
    match is_other_version(&bytes, head) {
        true => Err(Error::JournalVersion {
            path: path.to_owned(),
        }),
        false => Ok(Contents::read(&bytes, head)),
    }
}

/// Opens both files, creates missing ones, and reads them. The file with the older records comes
/// first.
fn open(index: &Path, head: &Head) -> Result<[(Contents, PathBuf, File); 2], Error> {
    let open = |path: PathBuf| {
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false);
        let file = open_regular(&path, options).map_err(Error::file("create", &path))?;
        Ok::<_, Error>((read_file(&path, &file, head)?, path, file))
    };
    let [first, second] = paths(index);
    let mut files = [open(first)?, open(second)?];
    files.sort_by_key(|(contents, ..)| contents.first);
    Ok(files)
}

/// Leaves only the head in a file.
fn empty(path: &Path, file: &File, head: &Head) -> Result<(), Error> {
    // The records go first: under a new head they would count.
    file.set_len(HEAD_LEN)
        .map_err(Error::file("truncate", path))?;
    file.write_all_at(head.as_bytes(), 0)
        .map_err(Error::bytes("write", path, 0))
}

impl Journal {
    /// Starts an empty journal in place of an existing one, for an index of so many entries.
    ///
    /// # Errors
    /// [`Error::File`] or [`Error::Bytes`] if a file cannot be created or written;
    /// [`Error::JournalVersion`] for one of another version.
    pub fn start(index: &Path, uuid: Uuid, boot: [u8; 36], entries: u64) -> Result<Self, Error> {
        let head = Head::new(uuid, boot);
        let [older, newer] = open(index, &head)?;
        let next = older.0.next.max(newer.0.next);
        // As in `remove`, the older records go first.
        for (_, path, file) in [&older, &newer] {
            empty(path, file, &head)?;
        }
        let mut journal = Self {
            files: [(older.1, older.2), (newer.1, newer.2)],
            head,
            active: 1,
            end: HEAD_LEN,
            next,
            position: IndexPosition {
                next,
                entries: Some(entries),
            },
            other_in_use: false,
            unclean: false,
        };
        journal.switch()?;
        Ok(journal)
    }

    /// Goes on behind what [`read`] returns, as if a flush of it had failed. `position` says which
    /// entry of the index the first mapping is to become.
    ///
    /// # Errors
    /// As [`Journal::start`].
    pub fn resume(
        index: &Path,
        uuid: Uuid,
        boot: [u8; 36],
        position: IndexPosition,
    ) -> Result<Self, Error> {
        let head = Head::new(uuid, boot);
        let [older, newer] = open(index, &head)?;
        Ok(Self {
            head,
            active: 1,
            end: newer.0.len,
            next: older.0.next.max(newer.0.next),
            position,
            other_in_use: older.0.first.is_some(),
            // Part of a record may follow.
            unclean: true,
            files: [(older.1, older.2), (newer.1, newer.2)],
        })
    }

    /// Number of the next mapping.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Cuts off what [`Journal::add`] wrote before it failed. Until then that may count if the process
    /// dies, whatever was changed since.
    ///
    /// # Errors
    /// The active file cannot be truncated.
    pub fn mend(&mut self) -> Result<(), Error> {
        if self.unclean {
            let (path, file) = &self.files[self.active];
            file.set_len(self.end)
                .map_err(Error::file("truncate", path))?;
            self.unclean = false;
        }
        Ok(())
    }

    /// Adds mappings. After an error none of them counts, once [`Journal::mend`] succeeds.
    ///
    /// # Errors
    /// [`Error::JournalFull`] if the file is as long as it may be; [`Error::Bytes`] if it cannot be
    /// written.
    pub fn add(&mut self, mappings: &[Mapping]) -> Result<(), Error> {
        let records: Vec<_> = mappings
            .iter()
            .zip(self.next..)
            .map(|(mapping, number)| Record::mapping(*mapping, number))
            .collect();
        self.append(&records)?;
        self.next += records.len() as u64;
        Ok(())
    }

    fn append(&mut self, records: &[Record]) -> Result<(), Error> {
        self.mend()?;
        let (path, file) = &self.files[self.active];
        let end = self.end + size_of_val(records) as u64;
        if end > MAX_LEN {
            return Err(Error::JournalFull {
                path: path.clone(),
                most: MAX_LEN,
            });
        }
        if let Err(error) = file.write_all_at(records.as_bytes(), self.end) {
            let error = Error::bytes("write", path, self.end)(error);
            self.unclean = true;
            // If this fails, the next caller tries again.
            let _ = self.mend();
            return Err(error);
        }
        self.end = end;
        Ok(())
    }

    /// Begins a flush of all mappings so far, and returns the number of the next one. New mappings go
    /// to the other file, if that is free; else to the same file.
    ///
    /// # Errors
    /// As [`Journal::mend`].
    pub fn begin_flush(&mut self) -> Result<u64, Error> {
        self.mend()?;
        if !self.other_in_use {
            // Only the space that the active file takes depends on it.
            let _ = self.switch();
        }
        Ok(self.next)
    }

    /// Lets the other file, which has no records, take new ones.
    fn switch(&mut self) -> Result<(), Error> {
        let other = 1 - self.active;
        let (path, file) = &self.files[other];
        let position = Record::position(self.position, self.next);
        let bytes = [self.head.as_bytes(), position.as_bytes()].concat();
        file.write_all_at(&bytes, 0)
            .map_err(Error::bytes("write", path, 0))?;
        self.other_in_use = self.end > HEAD_LEN;
        (self.active, self.end) = (other, bytes.len() as u64);
        Ok(())
    }

    /// The index is about to be written anew: which entry a mapping becomes is not known until
    /// [`Journal::end_flush`].
    ///
    /// # Errors
    /// As [`Journal::add`].
    pub fn begin_rewrite(&mut self) -> Result<(), Error> {
        let position = IndexPosition {
            entries: None,
            ..self.position
        };
        self.append(&[Record::position(position, self.next)])?;
        self.position = position;
        Ok(())
    }

    /// The index holds all mappings before number `next`, durably, and has so many entries.
    ///
    /// # Errors
    /// The position cannot be added, or the other file not be emptied. Nothing is lost by that; the
    /// journal takes more space.
    pub fn end_flush(&mut self, next: u64, entries: u64) -> Result<(), Error> {
        self.position = IndexPosition {
            next,
            entries: Some(entries),
        };
        let noted = self.append(&[Record::position(self.position, self.next)]);
        if self.other_in_use {
            let (path, file) = &self.files[1 - self.active];
            file.set_len(HEAD_LEN)
                .map_err(Error::file("truncate", path))?;
            self.other_in_use = false;
        }
        noted
    }

    /// No mapping counts any more, for good.
    ///
    /// # Errors
    /// Neither can that be noted, nor the files be emptied.
    pub fn discard(&mut self) -> Result<(), Error> {
        let position = IndexPosition {
            next: self.next,
            ..self.position
        };
        let noted = self.append(&[Record::position(position, self.next)]);
        // The active file last: it says that the other does not count.
        let empty = |number: usize| {
            let (path, file) = &self.files[number];
            file.set_len(0).map_err(Error::file("truncate", path))
        };
        let emptied = empty(1 - self.active).and_then(|()| empty(self.active));
        noted.or(emptied)
    }
}

#[cfg(test)]
impl Journal {
    /// Makes every write and [`Journal::mend`] fail; returns what [`Journal::heal`] takes.
    pub(super) fn fail(&mut self) -> io::Result<[(PathBuf, File); 2]> {
        let [(first, _), (second, _)] = &self.files;
        let read_only = [
            (first.clone(), File::open(first)?),
            (second.clone(), File::open(second)?),
        ];
        Ok(std::mem::replace(&mut self.files, read_only))
    }

    /// Makes them succeed again.
    pub(super) fn heal(&mut self, files: [(PathBuf, File); 2]) {
        self.files = files;
    }
}

#[cfg(test)]
mod tests;
