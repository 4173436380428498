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

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use uuid::Uuid;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, little_endian};

use super::Error;
use crate::format::crc;
use crate::format::lsmt::{ENTRY_LEN, Mapping};

const MAGIC: [u8; 8] = *b"ovbdjrn1";
/// Bytes before the records: a file without any keeps these, so that the first finds room.
const HEAD_LEN: u64 = size_of::<Head>() as u64;
/// Most bytes of a journal that are read.
const MAX_LEN: u64 = 256 << 20;

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, PartialEq)]
#[repr(C)]
struct Head {
    magic: [u8; 8],
    /// Of the running system, as text.
    boot: [u8; 36],
    /// Of the writable layer.
    uuid: [u8; 16],
    crc: little_endian::U32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Record {
    entry: [u8; ENTRY_LEN],
    /// Number of the record, over both files.
    number: little_endian::U64,
    crc: little_endian::U32,
    zero: [u8; 4],
}

impl Record {
    fn new(mapping: Mapping, number: u64) -> Self {
        let mut record = Self {
            entry: mapping.encode(),
            number: number.into(),
            crc: 0.into(),
            zero: [0; 4],
        };
        record.crc = record.sum().into();
        record
    }

    fn sum(&self) -> u32 {
        crc::raw(
            crc::raw(crc::BLOCK_SEED, &self.entry),
            self.number.as_bytes(),
        )
    }
}

/// The journal of one writable layer.
#[derive(Debug)]
pub struct Journal {
    files: [(PathBuf, File); 2],
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

/// The mappings that the journal of a layer holds, the oldest first.
///
/// # Errors
/// A file is there but cannot be read.
pub fn read(index: &Path, uuid: Uuid, boot: [u8; 36]) -> Result<Vec<Mapping>, Error> {
    let head = head(uuid, boot);
    let mut found = Vec::new();
    for path in paths(index) {
        match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            opened => {
                let file = opened.map_err(Error::file("open", &path))?;
                found.extend(read_file(&path, &file, &head)?);
            }
        }
    }
    found.sort_by_key(|(number, _)| *number);
    Ok(found.into_iter().map(|(_, mapping)| mapping).collect())
}

/// Mappings with the numbers of their records.
type Numbered = Vec<(u64, Mapping)>;

fn read_file(path: &Path, file: &File, head: &Head) -> Result<Numbered, Error> {
    let mut bytes = Vec::new();
    file.take(MAX_LEN)
        .read_to_end(&mut bytes)
        .map_err(Error::file("read", path))?;
    Ok(records(&bytes, head))
}

/// The valid records at the start of a file.
fn records(bytes: &[u8], head: &Head) -> Numbered {
    let Ok((found, rest)) = Head::read_from_prefix(bytes) else {
        return Vec::new();
    };
    if found != *head {
        return Vec::new();
    }
    let whole = rest.chunks_exact(size_of::<Record>());
    let record = |bytes: &[u8]| {
        let record = Record::read_from_bytes(bytes).ok()?;
        let mapping = Mapping::decode(&record.entry, 0).ok()??;
        (record.crc.get() == record.sum()).then_some((record.number.get(), mapping))
    };
    whole.map_while(record).collect()
}

fn head(uuid: Uuid, boot: [u8; 36]) -> Head {
    let mut head = Head {
        magic: MAGIC,
        boot,
        uuid: *uuid.as_bytes(),
        crc: 0.into(),
    };
    let len = size_of::<Head>() - size_of_val(&head.crc);
    head.crc = crc::raw(crc::BLOCK_SEED, &head.as_bytes()[..len]).into();
    head
}

/// Opens both files, or makes them, and reads them: those with the older records first.
fn open(index: &Path, head: &Head) -> Result<[(Numbered, PathBuf, File); 2], Error> {
    let open = |path: PathBuf| {
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false);
        let file = options.open(&path).map_err(Error::file("create", &path))?;
        Ok::<_, Error>((read_file(&path, &file, head)?, path, file))
    };
    let [first, second] = paths(index);
    let mut files = [open(first)?, open(second)?];
    files.sort_by_key(|(records, ..)| records.first().map(|(number, _)| *number));
    Ok(files)
}

/// Leaves nothing in a file but its head.
fn empty(path: &Path, file: &File, head: &Head) -> Result<(), Error> {
    // The records first: under a new head they would count.
    file.set_len(HEAD_LEN)
        .map_err(Error::file("truncate", path))?;
    file.write_all_at(head.as_bytes(), 0)
        .map_err(Error::bytes("write", path, 0))
}

impl Journal {
    /// Starts an empty journal in place of what there is. Where there was one, that takes no room.
    ///
    /// # Errors
    /// The files cannot be made.
    pub fn start(index: &Path, uuid: Uuid, boot: [u8; 36]) -> Result<Self, Error> {
        let head = head(uuid, boot);
        let [first, second] = open(index, &head)?;
        // The older records go first: without newer ones they would count again.
        for (_, path, file) in [&first, &second] {
            empty(path, file, &head)?;
        }
        Ok(Self {
            files: [(first.1, first.2), (second.1, second.2)],
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
        let head = head(uuid, boot);
        let [older, newer] = open(index, &head)?;
        for (records, path, file) in [&older, &newer] {
            if records.is_empty() {
                empty(path, file, &head)?;
            }
        }
        let records = &newer.0;
        Ok(Self {
            active: 1,
            end: HEAD_LEN + (records.len() * size_of::<Record>()) as u64,
            next: records.last().map_or(0, |(number, _)| number + 1),
            other_in_use: !older.0.is_empty(),
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
    /// As [`Journal::mend`].
    pub fn switch(&mut self) -> Result<(), Error> {
        self.mend()?;
        if !self.other_in_use {
            (self.active, self.end) = (1 - self.active, HEAD_LEN);
            self.other_in_use = true;
        }
        Ok(())
    }

    /// What came before [`Journal::switch`] is durable.
    ///
    /// # Errors
    /// The file cannot be emptied; then its records only count once more.
    pub fn settle(&mut self) -> Result<(), Error> {
        let (path, file) = &self.files[1 - self.active];
        file.set_len(HEAD_LEN)
            .map_err(Error::file("truncate", path))?;
        self.other_in_use = false;
        Ok(())
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

    #[test]
    fn survives_its_writer_but_no_restart_of_the_machine() {
        let folder = tempfile::tempdir().unwrap();
        let index = folder.path().join("index");
        let uuid = Uuid::from_u128(1);
        let mut journal = Journal::start(&index, uuid, BOOT).unwrap();
        journal.add(&[mapping(1), mapping(2)]).unwrap();
        journal.switch().unwrap();
        journal.add(&[mapping(3)]).unwrap();
        let all = [mapping(1), mapping(2), mapping(3)];
        assert_eq!(read(&index, uuid, BOOT).unwrap(), all);
        assert_eq!(read(&index, uuid, [b'b'; 36]).unwrap(), []);
        assert_eq!(read(&index, Uuid::from_u128(2), BOOT).unwrap(), []);
        // The flush failed: another one takes over what it began.
        journal.switch().unwrap();
        journal.add(&[mapping(4)]).unwrap();
        assert_eq!(read(&index, uuid, BOOT).unwrap().len(), 4);
        journal.settle().unwrap();
        assert_eq!(read(&index, uuid, BOOT).unwrap(), [mapping(3), mapping(4)]);
        journal.switch().unwrap();
        journal.settle().unwrap();
        assert_eq!(read(&index, uuid, BOOT).unwrap(), []);
    }

    #[test]
    fn goes_on_where_another_left_off() {
        let folder = tempfile::tempdir().unwrap();
        let index = folder.path().join("index");
        let uuid = Uuid::from_u128(1);
        let mut journal = Journal::start(&index, uuid, BOOT).unwrap();
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
            assert_eq!(read(&index, uuid, BOOT).unwrap(), all);
            if round == 3 {
                journal.switch().unwrap();
                journal.settle().unwrap();
                all = read(&index, uuid, BOOT).unwrap();
                assert!(!all.contains(&mapping(0)));
            }
        }
    }

    #[test]
    fn a_torn_record_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let index = folder.path().join("index");
        let mut journal = Journal::start(&index, Uuid::nil(), BOOT).unwrap();
        journal.add(&[mapping(1), mapping(2)]).unwrap();
        let (path, _) = &journal.files[0];
        let whole = fs::read(path).unwrap();
        for cut in 0..whole.len() {
            fs::write(path, &whole[..cut]).unwrap();
            let expected = cut.saturating_sub(size_of::<Head>()) / size_of::<Record>();
            let found = read(&index, Uuid::nil(), BOOT).unwrap();
            assert_eq!(found, [mapping(1), mapping(2)][..expected], "{cut}");
        }
        let mut flipped = whole;
        flipped[size_of::<Head>() + 3] ^= 1;
        fs::write(path, &flipped).unwrap();
        assert_eq!(read(&index, Uuid::nil(), BOOT).unwrap(), []);
    }
}
