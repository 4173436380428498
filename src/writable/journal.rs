//! Mappings that were answered for but are not durable yet.
//!
//! A mapping must not enter the index before its data is durable, which only a flush makes it; but
//! a write that was answered must outlive the process, for the guest goes on when a new one takes
//! over. So mappings wait in a journal, which is valid as long as the machine has not been started
//! again: the page cache that keeps it keeps the data as well. After a power loss it means nothing,
//! and the index alone counts.
//!
//! There are two files, used in turn: what a flush is about to make durable stays in one while new
//! mappings go to the other. Neither is ever synced. `docs/format.md` has their layout.
//!
//! Others do not know of it, and may append to the index what is newer than what waits here. So it
//! tells how many entries the index had: what follows those is ours if the journal begins with it.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use uuid::Uuid;
use zerocopy::IntoBytes;

use super::Error;
use super::journal_format::{Contents, Head, Record};
use crate::format::lsmt::Mapping;

/// Bytes before the records: a file without any keeps these, so that the first finds room.
const HEAD_LEN: u64 = size_of::<Head>() as u64;
/// Most bytes of a journal that are read.
const MAX_LEN: u64 = 256 << 20;

/// The journal of one writable layer.
#[derive(Debug)]
pub struct Journal {
    files: [(PathBuf, File); 2],
    /// What the head of the active file says.
    head: Head,
    /// Which of the files takes new records, and where.
    active: usize,
    end: u64,
    /// Number of the next record.
    next: u64,
    /// Whether the other file holds records.
    other_in_use: bool,
    /// Whether records that do not count could not be taken back yet.
    unclean: bool,
}

/// The paths of the two files that go with an index file.
pub fn paths(index: &Path) -> [PathBuf; 2] {
    ["journal0", "journal1"].map(|suffix| {
        let mut name = OsString::from(index);
        name.push(".");
        name.push(suffix);
        name.into()
    })
}

/// Removes the files, as far as they are there.
///
/// # Errors
/// The system refuses.
pub fn remove(index: &Path) -> Result<(), Error> {
    paths(index).iter().try_for_each(|path| remove_file(path))
}

/// Removes a file, if it is there.
///
/// # Errors
/// The system refuses.
pub(super) fn remove_file(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.map_err(Error::file("remove", path)),
    }
}

/// Name of the running system, which no other start of it has. Read once: later, the process may
/// no longer reach it.
///
/// # Errors
/// The kernel does not tell.
pub fn boot_id() -> Result<[u8; 36], Error> {
    static ID: OnceLock<[u8; 36]> = OnceLock::new();
    if let Some(id) = ID.get() {
        return Ok(*id);
    }
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    let text = fs::read(path).map_err(Error::file("read", path))?;
    let id = text.first_chunk().copied();
    let id = id.ok_or_else(|| Error::file("read", path)(io::ErrorKind::InvalidData.into()))?;
    Ok(*ID.get_or_init(|| id))
}

/// What the journal of a layer holds.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Mappings, the oldest first.
    pub mappings: Vec<Mapping>,
    /// Entries the index had when the last flush ended. What follows them is the beginning of
    /// `mappings`, which a flush did not get further with; or else somebody else's.
    pub entries: u64,
}

/// Reads the journal of a layer.
///
/// # Errors
/// A file is there but cannot be read.
pub fn read(index: &Path, uuid: Uuid, boot: [u8; 36]) -> Result<Found, Error> {
    let head = Head::new(uuid, boot, 0);
    let mut parts = Vec::new();
    for path in paths(index) {
        match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            opened => {
                let file = opened.map_err(Error::file("open", &path))?;
                parts.push(read_file(&path, &file, &head)?);
            }
        }
    }
    parts.sort_by_key(Contents::first);
    let records = parts.iter().flat_map(|part| &part.records);
    Ok(Found {
        mappings: records.map(|(_, mapping)| *mapping).collect(),
        entries: parts.last().map_or(0, |newest| newest.entries),
    })
}

fn read_file(path: &Path, file: &File, head: &Head) -> Result<Contents, Error> {
    let mut bytes = Vec::new();
    file.take(MAX_LEN)
        .read_to_end(&mut bytes)
        .map_err(Error::file("read", path))?;
    Ok(Contents::read(&bytes, head))
}

/// Opens both files, or makes them, and reads them: those with the older records first.
fn open(index: &Path, head: &Head) -> Result<[(Contents, PathBuf, File); 2], Error> {
    let open = |path: PathBuf| {
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false);
        let file = options.open(&path).map_err(Error::file("create", &path))?;
        Ok::<_, Error>((read_file(&path, &file, head)?, path, file))
    };
    let [first, second] = paths(index);
    let mut files = [open(first)?, open(second)?];
    files.sort_by_key(|(contents, ..)| contents.first());
    Ok(files)
}

/// Leaves nothing in a file but its head.
fn empty(path: &Path, file: &File, head: &Head) -> Result<(), Error> {
    // The records first: under a new head they would count.
    file.set_len(HEAD_LEN)
        .map_err(Error::file("truncate", path))?;
    write_head(path, file, head)
}

fn write_head(path: &Path, file: &File, head: &Head) -> Result<(), Error> {
    file.write_all_at(head.as_bytes(), 0)
        .map_err(Error::bytes("write", path, 0))
}

impl Journal {
    /// Starts an empty journal in place of what there is, for an index of so many entries. Where
    /// there was one, that takes no room.
    ///
    /// # Errors
    /// The files cannot be made.
    pub fn start(index: &Path, uuid: Uuid, boot: [u8; 36], entries: u64) -> Result<Self, Error> {
        let head = Head::new(uuid, boot, entries);
        let [first, second] = open(index, &head)?;
        // The older records go first: without newer ones they would count again.
        for (_, path, file) in [&first, &second] {
            empty(path, file, &head)?;
        }
        Ok(Self {
            files: [(first.1, first.2), (second.1, second.2)],
            head,
            active: 0,
            end: HEAD_LEN,
            next: 0,
            other_in_use: false,
            unclean: false,
        })
    }

    /// Goes on behind what [`read`] returns, as if a flush of it had failed.
    ///
    /// # Errors
    /// The files cannot be read, or not be made.
    pub fn resume(index: &Path, uuid: Uuid, boot: [u8; 36]) -> Result<Self, Error> {
        let head = Head::new(uuid, boot, 0);
        let [older, newer] = open(index, &head)?;
        let head = Head::new(uuid, boot, newer.0.entries);
        for (contents, path, file) in [&older, &newer] {
            if contents.records.is_empty() {
                empty(path, file, &head)?;
            }
        }
        let records = &newer.0.records;
        Ok(Self {
            head,
            active: 1,
            end: HEAD_LEN + (records.len() * size_of::<Record>()) as u64,
            next: records.last().map_or(0, |(number, _)| number + 1),
            other_in_use: !older.0.records.is_empty(),
            // Behind the records may be part of another.
            unclean: true,
            files: [(older.1, older.2), (newer.1, newer.2)],
        })
    }

    /// Takes back what [`Journal::add`] wrote in part and could not take back: it would count if we
    /// died, whatever was changed since.
    ///
    /// # Errors
    /// It still cannot.
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
    /// They cannot be written.
    pub fn add(&mut self, mappings: &[Mapping]) -> Result<(), Error> {
        let records: Vec<_> = mappings
            .iter()
            .zip(self.next..)
            .map(|(mapping, number)| Record::new(*mapping, number))
            .collect();
        self.mend()?;
        let (path, file) = &self.files[self.active];
        if let Err(error) = file.write_all_at(records.as_bytes(), self.end) {
            let error = Error::bytes("write", path, self.end)(error);
            self.unclean = true;
            // Else it is tried again.
            let _ = self.mend();
            return Err(error);
        }
        self.next += records.len() as u64;
        self.end += size_of_val(&*records) as u64;
        Ok(())
    }

    /// New mappings go to the other file, if it is empty: a flush is about to make durable what
    /// this one holds.
    ///
    /// # Errors
    /// As [`Journal::mend`]; or the other file cannot be written.
    pub fn switch(&mut self) -> Result<(), Error> {
        self.mend()?;
        if !self.other_in_use {
            let (path, file) = &self.files[1 - self.active];
            write_head(path, file, &self.head)?;
            (self.active, self.end) = (1 - self.active, HEAD_LEN);
            self.other_in_use = true;
        }
        Ok(())
    }

    /// What came before [`Journal::switch`] is durable, in an index of so many entries.
    ///
    /// # Errors
    /// A file cannot be written or emptied; then its records only count once more.
    pub fn settle(&mut self, entries: u64) -> Result<(), Error> {
        self.set_entries(entries)?;
        let (path, file) = &self.files[1 - self.active];
        file.set_len(HEAD_LEN)
            .map_err(Error::file("truncate", path))?;
        self.other_in_use = false;
        Ok(())
    }

    /// The index has so many entries, or no more than that; what follows them is not ours.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn set_entries(&mut self, entries: u64) -> Result<(), Error> {
        self.head.set_entries(entries);
        let (path, file) = &self.files[self.active];
        write_head(path, file, &self.head)
    }

    /// No record counts any more, for good.
    ///
    /// # Errors
    /// A file cannot be emptied.
    pub fn discard(&self) -> Result<(), Error> {
        let mut files = self.files.iter();
        files.try_for_each(|(path, file)| file.set_len(0).map_err(Error::file("truncate", path)))
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
mod tests {
    use super::*;
    use crate::units::Sector;

    const BOOT: [u8; 36] = [b'a'; 36];

    fn mapping(start: u64) -> Mapping {
        Mapping::data(Sector(start), 1, Sector(8 + start)).unwrap()
    }

    fn known(index: &Path, uuid: Uuid, boot: [u8; 36]) -> Vec<Mapping> {
        read(index, uuid, boot).unwrap().mappings
    }

    #[test]
    fn survives_its_writer_but_no_restart_of_the_machine() {
        let folder = tempfile::tempdir().unwrap();
        let index = folder.path().join("index");
        let uuid = Uuid::from_u128(1);
        let mut journal = Journal::start(&index, uuid, BOOT, 9).unwrap();
        journal.add(&[mapping(1), mapping(2)]).unwrap();
        journal.switch().unwrap();
        journal.add(&[mapping(3)]).unwrap();
        let all = [mapping(1), mapping(2), mapping(3)];
        assert_eq!(known(&index, uuid, BOOT), all);
        assert_eq!(known(&index, uuid, [b'b'; 36]), []);
        assert_eq!(known(&index, Uuid::from_u128(2), BOOT), []);
        // The flush failed: another one takes over what it began.
        journal.switch().unwrap();
        journal.add(&[mapping(4)]).unwrap();
        assert_eq!(known(&index, uuid, BOOT).len(), 4);
        journal.settle(9).unwrap();
        assert_eq!(known(&index, uuid, BOOT), [mapping(3), mapping(4)]);
        journal.switch().unwrap();
        journal.settle(9).unwrap();
        assert_eq!(known(&index, uuid, BOOT), []);
    }

    #[test]
    fn goes_on_where_another_left_off() {
        let folder = tempfile::tempdir().unwrap();
        let index = folder.path().join("index");
        let uuid = Uuid::from_u128(1);
        let mut journal = Journal::start(&index, uuid, BOOT, 9).unwrap();
        let mut all = Vec::new();
        for round in 0..6 {
            let new = [mapping(2 * round), mapping(2 * round + 1)];
            journal.add(&new).unwrap();
            all.extend(new);
            if round % 3 == 1 {
                journal.switch().unwrap();
            }
            // Part of a record that was on its way.
            let (_, file) = &journal.files[journal.active];
            file.write_all_at(&[1; 9], journal.end).unwrap();
            journal = Journal::resume(&index, uuid, BOOT).unwrap();
            assert_eq!(known(&index, uuid, BOOT), all);
            if round == 3 {
                journal.switch().unwrap();
                journal.settle(9).unwrap();
                all = known(&index, uuid, BOOT);
                assert!(!all.contains(&mapping(0)));
            }
        }
    }

    #[test]
    fn a_torn_record_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let index = folder.path().join("index");
        let mut journal = Journal::start(&index, Uuid::nil(), BOOT, 9).unwrap();
        journal.add(&[mapping(1), mapping(2)]).unwrap();
        let (path, _) = &journal.files[0];
        let whole = fs::read(path).unwrap();
        for cut in 0..whole.len() {
            fs::write(path, &whole[..cut]).unwrap();
            let expected = cut.saturating_sub(size_of::<Head>()) / size_of::<Record>();
            let found = known(&index, Uuid::nil(), BOOT);
            assert_eq!(found, [mapping(1), mapping(2)][..expected], "{cut}");
        }
        let mut flipped = whole;
        flipped[size_of::<Head>() + 3] ^= 1;
        fs::write(path, &flipped).unwrap();
        assert_eq!(known(&index, Uuid::nil(), BOOT), []);
    }
}
