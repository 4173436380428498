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
use super::files::sync_name;
use super::index_file::IndexFile;
use super::journal;
use super::layer::sparse_place;
use super::{Error, Paths};
use crate::format::lsmt::writable::{Kind, decode_data_header};
use crate::format::lsmt::{FIRST_DATA, HEADER_LEN, Header, HeaderKind, Mapping};
use crate::io::directory::parent_of;
use crate::io::regular::open_regular;
use crate::units::{ByteRange, Sector, SectorRange, Sectors};

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
    pub index: IndexFile,
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
    pub fn repair_index(&mut self, paths: &Paths) -> Result<(), Error> {
        // Holes mislead nobody.
        if !self.index_misleads || self.by_holes {
            return Ok(());
        }
        let synced = self.data.sync_all();
        synced.map_err(Error::file("sync", &paths.data))?;
        self.index.replace(&self.header, mappings(&self.map))?;
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
    let (index, index_header) = IndexFile::open(&paths.index, access == Access::Write)?;
    if index_header
        .as_ref()
        .is_some_and(|index| index.uuid != header.uuid)
    {
        return Err(Error::NoPair {
            data: path.clone(),
            index: paths.index.clone(),
        });
    }
    if index_header.is_none() && kind != Kind::Sparse {
        return Err(Error::TooShort {
            path: paths.index.clone(),
            expected: "index file",
            found: 0,
        });
    }
    let mut loaded = Loaded {
        data,
        index,
        header,
        kind,
        map,
        journal: Vec::new(),
        next: 0,
        by_holes: index_header.is_none(),
        index_is_stale: index_header.is_none(),
        index_misleads: index_header.is_none(),
    };
    let file_end = Sector::containing(len);
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
        sync_name(&paths.data)?;
        if parent_of(&paths.index) != parent_of(&paths.data) {
            sync_name(&paths.index)?;
        }
    }
    Ok(loaded)
}

impl Loaded {
    /// Enters what the holes of a sparse data file tell.
    fn map_holes(&mut self, path: &Path, len: u64) -> Result<(), Error> {
        // What lies beyond the disk is not part of it, like what sealing began to append.
        let disk = Sector::at_or_after(self.header.virtual_size);
        let end = FIRST_DATA.checked_add(disk - Sector(0));
        let end = end.and_then(Sector::checked_byte).unwrap_or(len).min(len);
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
        if entry > self.index.entries() {
            // Somebody cut it short.
            (self.index_is_stale, self.index_misleads) = (true, true);
        } else if !self.index.go_back(entry, &mappings)? {
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
        let (map, index) = (&mut self.map, &self.index);
        let torn = index.replay(|mapping| match is_there(&mapping, file_end) {
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
    let trailer = trailer.and_then(|()| Header::decode(&bytes, HeaderKind::Trailer).ok());
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
        false => Place::Data(mapping.moffset()),
    };
    let range = SectorRange::new(mapping.offset(), mapping.end());
    let extent = Extent { range, place };
    map.insert(extent, |_| ());
}

/// Everything a sparse file does not leave out counts as data, in whole blocks of its file system.
fn scan_holes(data: &File, len: u64, map: &mut ExtentMap) -> io::Result<()> {
    let first = HEADER_LEN as u64;
    let mut at = first;
    while at < len {
        let start = match rustix::fs::seek(data, SeekFrom::Data(at)) {
            Err(Errno::NXIO) => return Ok(()), // nothing but a hole up to the end of the file
            found => found?.max(first),
        };
        let end = rustix::fs::seek(data, SeekFrom::Hole(start))?.min(len);
        let data = ByteRange::new(start, end).sectors();
        if data.is_empty() {
            return Ok(()); // nothing but a hole up to `len`
        }
        let on_disk = |sector: Sector| Sector(0) + (sector - FIRST_DATA);
        let extent = Extent {
            range: SectorRange::new(on_disk(data.start()), on_disk(data.end())),
            place: Place::Data(data.start()),
        };
        map.insert(extent, |_| ());
        at = data.end().byte();
    }
    Ok(())
}

/// Refuses layers whose data cannot be overwritten in place.
fn check_places(loaded: &Loaded) -> Result<(), Error> {
    let misplaced = |extent: &Extent, data: SectorRange| Error::Misplaced {
        path: loaded.index.path().to_owned(),
        offset: extent.start(),
        moffset: data.start(),
    };
    let with_data = |extent: Extent| Some((extent.data()?, extent));
    let mut places: Vec<_> = loaded.map.iter().filter_map(with_data).collect();
    if loaded.kind == Kind::Sparse {
        let is_moved =
            |(data, extent): &&(SectorRange, Extent)| *data != sparse_place(extent.range);
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
        assert!(loaded.by_holes && loaded.map.is_empty());
    }
}
