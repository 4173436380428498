//! Reads what the files of a writable layer hold, whoever wrote them.
//!
//! Where upstream would refuse to open, or make something up, this goes by what is certainly there:
//! an entry that points past the end of the data was never durable, so it never was; and a sparse
//! layer without a log has what its file does not leave out.

use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::extent_map::{Extent, ExtentMap, Place, mappings};
use super::index_file::{IndexFile, folder_of, sync_folder_of};
use super::journal;
use super::{Error, Paths};
use crate::format::lsmt::writable::{Kind, decode_data_header};
use crate::format::lsmt::{FIRST_DATA, HEADER_LEN, Header, Mapping, Part};
use crate::io::regular::open_regular;
use crate::units::{SECTOR_SIZE, Sector, Sectors};

/// How long somebody else may hold the files before that is an error.
const LOCK_LIMIT: Duration = Duration::from_millis(500);

/// How somebody wants the files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// To read them; others may as well.
    Read,
    /// To write them, alone.
    Write,
}

/// The open files of a writable layer, and what they say.
#[derive(Debug)]
pub struct Loaded {
    /// The data file.
    pub data: File,
    /// The index file.
    pub log: IndexFile,
    /// What the data file says about the layer.
    pub header: Header,
    /// How data is placed.
    pub kind: Kind,
    /// Where the data of which sectors is.
    pub map: ExtentMap,
    /// Mappings of the journal, which are part of the map. The index ends where the first of them is to
    /// be appended.
    pub journal: Vec<Mapping>,
    /// Number of the first of them.
    pub next: u64,
    /// Whether the index file says nothing, and the holes of the data file tell what there is.
    pub by_holes: bool,
    /// Whether the index file does not say what the map says: it is missing a header, or has
    /// entries without data.
    pub index_is_stale: bool,
    /// Whether index or journal say what is wrong once the data file grows, or the index says
    /// nothing: it must be made anew before anything is written.
    pub index_misleads: bool,
}

impl Loaded {
    /// Makes an index that misleads say what the map says, durably, and empties the journal: to be
    /// done before the data file grows, or what is appended becomes what an entry points at.
    ///
    /// # Errors
    /// A file cannot be written, or not be made durable.
    pub fn settle_index(&mut self, paths: &Paths) -> Result<(), Error> {
        // Holes mislead nobody.
        if !self.index_misleads || self.by_holes {
            return Ok(());
        }
        let synced = self.data.sync_all();
        synced.map_err(Error::file("sync", &paths.data))?;
        self.log.replace(&self.header, mappings(&self.map))?;
        journal::remove(&paths.index)?;
        self.journal.clear();
        (self.index_is_stale, self.index_misleads) = (false, false);
        Ok(())
    }
}

/// Opens the files of a layer and reads its map into `map`, an empty one.
///
/// # Errors
/// They cannot be read, or are no writable layer, or somebody else has them open.
pub fn load(paths: &Paths, access: Access, map: ExtentMap) -> Result<Loaded, Error> {
    let path = &paths.data;
    let mut options = File::options();
    options.read(true).write(access == Access::Write);
    let data = open_regular(path, options).map_err(Error::file("open", path))?;
    lock(&data, path, access)?;
    let len = data.metadata().map_err(Error::file("examine", path))?.len();
    if len < HEADER_LEN as u64 {
        return Err(Error::TooShort {
            path: path.clone(),
            expected: "data file",
            found: len,
        });
    }
    let (header, kind) = read_header(&data, path)?;
    if is_sealed(&data, len, &header) {
        return Err(Error::Sealed { path: path.clone() });
    }
    let (log, log_header) = IndexFile::open(&paths.index, access == Access::Write)?;
    if log_header
        .as_ref()
        .is_some_and(|log| log.uuid != header.uuid)
    {
        return Err(Error::NoPair {
            data: path.clone(),
            index: paths.index.clone(),
        });
    }
    if log_header.is_none() && kind != Kind::Sparse {
        return Err(Error::TooShort {
            path: paths.index.clone(),
            expected: "index file",
            found: 0,
        });
    }
    let mut loaded = Loaded {
        data,
        log,
        header,
        kind,
        map,
        journal: Vec::new(),
        next: 0,
        by_holes: log_header.is_none(),
        index_is_stale: log_header.is_none(),
        index_misleads: log_header.is_none(),
    };
    let file_end = Sector(len / SECTOR_SIZE);
    if loaded.by_holes {
        loaded.map_holes(path, len)?;
    }
    let journal = loaded.find_journal(paths)?;
    loaded.replay_index(paths, file_end)?;
    loaded.replay_journal(journal, file_end);
    if access == Access::Write {
        check_places(&loaded)?;
        // Who made or replaced a file and died may not have made its name durable; what is flushed to
        // it from now on must be.
        sync_folder_of(&paths.data)?;
        if folder_of(&paths.index) != folder_of(&paths.data) {
            sync_folder_of(&paths.index)?;
        }
    }
    Ok(loaded)
}

impl Loaded {
    /// Enters what the holes of a sparse data file tell.
    fn map_holes(&mut self, path: &Path, len: u64) -> Result<(), Error> {
        // What lies beyond the disk is not part of it, like what sealing began to append.
        let disk = Sector::at_or_after(self.header.virtual_size);
        let end = disk.0.saturating_add(FIRST_DATA.0);
        let end = end.saturating_mul(SECTOR_SIZE).min(len);
        scan_holes(&self.data, end, &mut self.map).map_err(Error::file("scan", path))
    }

    /// Reads the journal, and lets the index end where its mappings begin. Returns the mappings that
    /// count.
    fn find_journal(&mut self, paths: &Paths) -> Result<Vec<Mapping>, Error> {
        let found = journal::read(&paths.index, self.header.uuid, journal::boot_id())?;
        let (numbers, mappings): (Vec<_>, Vec<_>) = found.mappings.iter().copied().unzip();
        let Some(first) = numbers.first() else {
            return Ok(mappings);
        };
        self.next = *first;
        let Some(entry) = found.first_entry() else {
            // The index was being written anew: it may hold any of them.
            return Ok(mappings);
        };
        if entry > self.log.entries() {
            // Somebody cut it short.
            (self.index_is_stale, self.index_misleads) = (true, true);
        } else if !self.log.go_back(entry, &mappings)? {
            ::log::warn!(
                "{}: another program changed the index since the journal was written; dropped {} \
         mappings that were not flushed",
                paths.index.display(),
                mappings.len()
            );
            return Ok(Vec::new());
        }
        Ok(mappings)
    }

    /// Enters what the index says.
    fn replay_index(&mut self, paths: &Paths, file_end: Sector) -> Result<(), Error> {
        let mut without_data = 0;
        let (map, log) = (&mut self.map, &self.log);
        let torn = log.replay(|mapping| match is_there(&mapping, file_end) {
            true => enter(map, mapping),
            false => without_data += 1,
        })?;
        if torn + without_data > 0 {
            ::log::warn!(
                "{}: dropped {torn} torn entries and {without_data} entries that point past the end of \
         {}; their data was never flushed",
                paths.index.display(),
                paths.data.display()
            );
            self.index_is_stale = true;
        }
        self.index_misleads |= without_data > 0;
        Ok(())
    }

    /// Enters what the journal says.
    fn replay_journal(&mut self, found: Vec<Mapping>, file_end: Sector) {
        let count = found.len();
        self.journal = found;
        self.journal.retain(|mapping| is_there(mapping, file_end));
        self.index_misleads |= self.journal.len() < count;
        for mapping in &self.journal {
            enter(&mut self.map, *mapping);
        }
    }
}

/// Lets nobody else write to the file, nor read it while it is written to. A process that was killed
/// may hold it for a moment more.
fn lock(data: &File, path: &Path, access: Access) -> Result<(), Error> {
    let start = Instant::now();
    loop {
        let locked = match access {
            Access::Read => data.try_lock_shared(),
            Access::Write => data.try_lock(),
        };
        match locked {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) if start.elapsed() < LOCK_LIMIT => {
                thread::sleep(Duration::from_millis(10));
            }
            Err(TryLockError::WouldBlock) => {
                return Err(Error::Busy {
                    path: path.to_owned(),
                });
            }
            Err(TryLockError::Error(source)) => return Err(Error::file("lock", path)(source)),
        }
    }
}

fn read_header(data: &File, path: &Path) -> Result<(Header, Kind), Error> {
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

/// Whether the file ends with the trailer of this very layer. That its uuid fits tells it from
/// data of the guest's that looks like one.
pub(super) fn is_sealed(data: &File, len: u64, header: &Header) -> bool {
    let mut bytes = [0; HEADER_LEN];
    let Some(at) = len.checked_sub(HEADER_LEN as u64) else {
        return false;
    };
    let trailer = data.read_exact_at(&mut bytes, at).ok();
    let trailer = trailer.and_then(|()| Header::decode(&bytes, Part::Trailer).ok());
    trailer.is_some_and(|trailer| !header.uuid.is_nil() && trailer.uuid == header.uuid)
}

fn is_there(mapping: &Mapping, file_end: Sector) -> bool {
    let start = mapping.moffset();
    let end = start.checked_add(Sectors(mapping.length().into()));
    mapping.is_zeroed() || (start >= FIRST_DATA && end.is_some_and(|end| end <= file_end))
}

fn enter(map: &mut ExtentMap, mapping: Mapping) {
    let place = match mapping.is_zeroed() {
        true => Place::Zero,
        false => Place::Data(mapping.moffset().0),
    };
    let extent = Extent {
        start: mapping.offset().0,
        len: u64::from(mapping.length()),
        place,
    };
    map.insert(extent, |_| ());
}

/// Everything a sparse file does not leave out counts as data, in whole blocks of its file system.
fn scan_holes(data: &File, len: u64, map: &mut ExtentMap) -> io::Result<()> {
    let first = HEADER_LEN as u64;
    let mut at = first;
    while at < len {
        let start = match rustix::fs::seek(data, SeekFrom::Data(at)) {
            Err(Errno::NXIO) => return Ok(()), // nothing but a hole up to the end
            found => found?.max(first),
        };
        let end = rustix::fs::seek(data, SeekFrom::Hole(start))?.min(len);
        let (start, end) = (start / SECTOR_SIZE, end.div_ceil(SECTOR_SIZE));
        let disk = start - FIRST_DATA.0;
        let extent = Extent {
            start: disk,
            len: end - start,
            place: Place::Data(start),
        };
        map.insert(extent, |_| ());
        at = end * SECTOR_SIZE;
    }
    Ok(())
}

/// Refuses layers whose data cannot be overwritten in place.
fn check_places(loaded: &Loaded) -> Result<(), Error> {
    let misplaced = |extent: &Extent, at: u64| Error::Misplaced {
        path: loaded.log.path().to_owned(),
        offset: Sector(extent.start),
        moffset: Sector(at),
    };
    let data = |extent: Extent| match extent.place {
        Place::Data(at) => Some((at, extent)),
        Place::Zero => None,
    };
    let mut places: Vec<_> = loaded.map.iter().filter_map(data).collect();
    if loaded.kind == Kind::Sparse {
        let moved = |(at, extent): &&(u64, Extent)| *at != FIRST_DATA.0 + extent.start;
        let found = places.iter().find(moved);
        return found.map_or(Ok(()), |(at, extent)| Err(misplaced(extent, *at)));
    }
    places.sort_unstable_by_key(|(at, _)| *at);
    let overlaps = |pair: &&[(u64, Extent)]| pair[0].0 + pair[0].1.len > pair[1].0;
    match places.windows(2).find(overlaps) {
        Some(pair) => Err(misplaced(&pair[1].1, pair[1].0)),
        None => Ok(()),
    }
}
