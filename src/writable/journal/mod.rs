//! The journal of a writable layer: mappings of answered writes that are not in the index yet.
//!
//! A mapping must not enter the index before its data is durable, which takes a flush. But an answered write must
//! outlive the process: the guest continues when a new process takes over. So mappings wait in a journal. It is valid
//! for one boot of the kernel, because the page cache that holds it holds the data too. After a power loss only the
//! index is valid.
//!
//! Mappings are numbered. There are two files: while a flush makes the mappings of one durable, new mappings go to the
//! other. After a failed flush, one file may hold mappings that are in the index and mappings that are not. The
//! [`IndexPosition`], a record of its own, separates them: the index holds all mappings before number `next`, and
//! mapping `next` becomes entry `entries`. Each file begins with a position, and each successful flush adds one. If it
//! cannot be added, an older position gives the same result: each later mapping becomes the next entry.
//!
//! Neither file is ever synced. `docs/format.md` has their layout.
#![cfg_attr(
    not(test),
    warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)
)]

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

/// Bytes before the records. A file without records keeps them, so that its first records find space.
const HEAD_LEN: u64 = size_of::<Head>() as u64;

/// Most bytes of a journal file. A file grows to that only if it cannot be emptied.
const MAX_JOURNAL_LEN: u64 = 256 << 20;

/// The journal of one writable layer.
#[derive(Debug)]
pub struct Journal {
    /// Takes new records.
    current: JournalFile,
    other: JournalFile,
    head: Head,
    /// Bytes of the current file that are valid.
    end: u64,
    /// Number of the next mapping.
    next: u64,
    position: IndexPosition,
    /// Whether the other file may hold records.
    other_in_use: bool,
    /// Whether the current file may have bytes behind `end` that could not be cut off yet.
    unclean: bool,
}

/// One of the two files.
#[derive(Debug)]
struct JournalFile {
    path: PathBuf,
    file: File,
}

impl JournalFile {
    /// Opens a file, which is created if missing.
    fn open(path: PathBuf) -> Result<Self, Error> {
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false);
        let file = open_regular(&path, options).map_err(Error::file("create", &path))?;
        Ok(Self { path, file })
    }

    fn write(&self, bytes: &[u8], at: u64) -> Result<(), Error> {
        let written = self.file.write_all_at(bytes, at);
        written.map_err(Error::bytes("write", &self.path, at))
    }

    fn truncate(&self, len: u64) -> Result<(), Error> {
        let truncated = self.file.set_len(len);
        truncated.map_err(Error::file("truncate", &self.path))
    }

    /// Leaves only the head.
    fn empty(&self, head: &Head) -> Result<(), Error> {
        // The records are removed first: under a new head they would be valid.
        self.truncate(HEAD_LEN)?;
        self.write(head.as_bytes(), 0)
    }

    /// Reads the records of the journal of `head`.
    fn read(&self, head: &Head) -> Result<Contents, Error> {
        let bytes = read_bytes(&self.path, &self.file)?;
        match is_other_version(&bytes, head) {
            true => Err(Error::JournalVersion {
                path: self.path.clone(),
            }),
            false => Ok(Contents::read(&bytes, head)),
        }
    }
}

/// Returns the paths of the two journal files of an index file.
pub fn paths(index: &Path) -> [PathBuf; 2] {
    ["journal0", "journal1"].map(|suffix| with_suffix(index, suffix))
}

/// Removes the files that exist. The file with the older records is removed first: the newer records alone give the
/// same result as both files; the older ones alone would bring old data back.
///
/// # Errors
/// [`Error::File`] if a file cannot be read or removed.
pub fn remove(index: &Path) -> Result<(), Error> {
    oldest_first(index)?
        .iter()
        .try_for_each(|path| remove_file(path))
}

/// The paths of the files that exist, with any content; the one with the older records first.
fn oldest_first(index: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut files = Vec::new();
    for path in paths(index) {
        if let Some(file) = open_existing(&path)? {
            let bytes = read_bytes(&path, &file)?;
            let head = Head::read_from_prefix(&bytes).ok();
            let first = head.and_then(|(head, _)| Contents::read(&bytes, &head).first);
            files.push((first, path));
        }
    }
    files.sort();
    Ok(files.into_iter().map(|(_, path)| path).collect())
}

/// Opens a file to read it; `None` if it does not exist.
fn open_existing(path: &Path) -> Result<Option<File>, Error> {
    match open_to_read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        opened => opened.map(Some).map_err(Error::file("open", path)),
    }
}

/// Returns the id of this boot of the kernel, as text. Without one, returns a random id, so that no journal outlives its
/// process.
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

/// The content of a journal.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Mappings that may not be in the index, with their numbers, oldest first.
    pub mappings: Vec<(u64, Mapping)>,
    /// The newest position of the index.
    pub position: Option<IndexPosition>,
}

impl Found {
    /// Returns the number of the index entry that the first mapping is, or becomes. `None`: unknown.
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
/// [`Error::File`] if an existing file cannot be read; [`Error::JournalVersion`].
pub fn read(index: &Path, uuid: Uuid, boot: [u8; 36]) -> Result<Found, Error> {
    let head = Head::new(uuid, boot);
    let mut parts = Vec::new();
    for path in paths(index) {
        if let Some(file) = open_existing(&path)? {
            parts.push(JournalFile { path, file }.read(&head)?);
        }
    }
    parts.sort_by_key(|part| part.first);
    Ok(found(&parts))
}

/// Combines the contents of the files, the older one first.
fn found(parts: &[Contents]) -> Found {
    let positions = parts.iter().flat_map(|part| &part.positions);
    // A file may have begun with a copy of a position before a newer one was added to the other. If two differ in the
    // entry alone, the index may have been rewritten, and the entry is not known.
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
    file.take(MAX_JOURNAL_LEN)
        .read_to_end(&mut bytes)
        .map_err(Error::file("read", path))?;
    Ok(bytes)
}

/// Opens both files and reads them; the one with the older records comes first.
fn open(index: &Path, head: &Head) -> Result<[(Contents, JournalFile); 2], Error> {
    let open = |path| {
        let file = JournalFile::open(path)?;
        Ok::<_, Error>((file.read(head)?, file))
    };
    let [first, second] = paths(index);
    let mut files = [open(first)?, open(second)?];
    files.sort_by_key(|(contents, _)| contents.first);
    Ok(files)
}

impl Journal {
    /// Starts an empty journal in place of an existing one, for an index of `entries` entries.
    ///
    /// # Errors
    /// [`Error::File`] or [`Error::Bytes`] if a file cannot be created or written; [`Error::JournalVersion`].
    pub fn start(index: &Path, uuid: Uuid, boot: [u8; 36], entries: u64) -> Result<Self, Error> {
        let head = Head::new(uuid, boot);
        let [(older, older_file), (newer, newer_file)] = open(index, &head)?;
        let next = older.next.max(newer.next);
        // As in `remove`, the older records go first.
        older_file.empty(&head)?;
        newer_file.empty(&head)?;
        let mut journal = Self {
            current: newer_file,
            other: older_file,
            head,
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

    /// Continues the journal that [`read`] returned, as if a flush of it had failed. `position` names the entry of
    /// the index its first mapping becomes.
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
        let [(older, older_file), (newer, newer_file)] = open(index, &head)?;
        Ok(Self {
            current: newer_file,
            other: older_file,
            head,
            end: newer.len,
            next: older.next.max(newer.next),
            position,
            other_in_use: older.first.is_some(),
            // Part of a record may follow.
            unclean: true,
        })
    }

    /// Number of the next mapping.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Cuts off the bytes that a failed [`Journal::add`] wrote. Until then, a later process may take them for valid
    /// records.
    ///
    /// # Errors
    /// [`Error::File`] if the current file cannot be truncated.
    pub fn mend(&mut self) -> Result<(), Error> {
        if self.unclean {
            self.current.truncate(self.end)?;
            self.unclean = false;
        }
        Ok(())
    }

    /// Adds mappings. After an error none of them is valid, once [`Journal::mend`] succeeds.
    ///
    /// # Errors
    /// [`Error::JournalFull`]; [`Error::Bytes`] if the current file cannot be written.
    pub fn add(&mut self, mappings: &[Mapping]) -> Result<(), Error> {
        let records: Vec<_> = mappings
            .iter()
            .zip(self.next..)
            .map(|(mapping, number)| Record::mapping(*mapping, number))
            .collect();
        self.append(&records)?;
        self.next = self.next.saturating_add(records.len() as u64);
        Ok(())
    }

    fn append(&mut self, records: &[Record]) -> Result<(), Error> {
        self.mend()?;
        let end = self.end.saturating_add(size_of_val(records) as u64);
        if end > MAX_JOURNAL_LEN {
            return Err(Error::JournalFull {
                path: self.current.path.clone(),
                most: MAX_JOURNAL_LEN,
            });
        }
        if let Err(error) = self.current.write(records.as_bytes(), self.end) {
            self.unclean = true;
            // If this fails, the next caller tries again.
            let _ = self.mend();
            return Err(error);
        }
        self.end = end;
        Ok(())
    }

    /// Begins a flush of all mappings so far; returns the number of the next one. New mappings go to the other file if
    /// that has no records; else to the same file.
    ///
    /// # Errors
    /// As [`Journal::mend`].
    pub fn begin_flush(&mut self) -> Result<u64, Error> {
        self.mend()?;
        if !self.other_in_use {
            // A failure only costs space in the current file.
            let _ = self.switch();
        }
        Ok(self.next)
    }

    /// Makes the other file, which has no records, the current one.
    fn switch(&mut self) -> Result<(), Error> {
        let position = Record::position(self.position, self.next);
        let bytes = [self.head.as_bytes(), position.as_bytes()].concat();
        self.other.write(&bytes, 0)?;
        std::mem::swap(&mut self.current, &mut self.other);
        self.other_in_use = self.end > HEAD_LEN;
        self.end = bytes.len() as u64;
        Ok(())
    }

    /// Notes that the index is about to be rewritten: which entry a mapping becomes is not known until
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

    /// Notes that the index holds all mappings before number `next`, durably, and has `entries` entries.
    ///
    /// # Errors
    /// As [`Journal::add`], if the position cannot be added; [`Error::File`] if the other file cannot be emptied. Nothing
    /// is lost then; the journal takes more space.
    pub fn end_flush(&mut self, next: u64, entries: u64) -> Result<(), Error> {
        self.position = IndexPosition {
            next,
            entries: Some(entries),
        };
        let noted = self.append(&[Record::position(self.position, self.next)]);
        if self.other_in_use {
            self.other.truncate(HEAD_LEN)?;
            self.other_in_use = false;
        }
        noted
    }

    /// Makes all mappings invalid.
    ///
    /// # Errors
    /// As [`Journal::add`], if neither a position can be added nor the files be emptied.
    pub fn invalidate(&mut self) -> Result<(), Error> {
        let position = IndexPosition {
            next: self.next,
            ..self.position
        };
        let noted = self.append(&[Record::position(position, self.next)]);
        // The current file last: its position makes the records of the other invalid.
        let emptied = self
            .other
            .truncate(0)
            .and_then(|()| self.current.truncate(0));
        noted.or(emptied)
    }
}

#[cfg(test)]
impl Journal {
    /// Makes every write and [`Journal::mend`] fail; returns what [`Journal::heal`] takes.
    pub(super) fn fail(&mut self) -> io::Result<[File; 2]> {
        let read_only = |file: &mut JournalFile| {
            let opened = File::open(&file.path)?;
            Ok::<_, io::Error>(std::mem::replace(&mut file.file, opened))
        };
        Ok([read_only(&mut self.current)?, read_only(&mut self.other)?])
    }

    /// Makes them succeed again.
    pub(super) fn heal(&mut self, [current, other]: [File; 2]) {
        (self.current.file, self.other.file) = (current, other);
    }
}

#[cfg(test)]
mod tests;
