//! Image tables in the cache: found, created, listed, verified.
//!
//! A tables file is created empty under its final name and written by the process that created it, at
//! its leisure: that process is in its sandbox by then, where it can write to an open file and cannot
//! rename one. As long as it writes, it holds the file's exclusive lock. Without a valid header, an
//! unlocked file is what a writer left behind that was killed or failed.
//!
//! A process that could open any file here for writing could forge the tables of all images. So a
//! disk's process gets one file, that of its own layers, and only if no valid one is there.

use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::SystemTime;

use super::entry::{is_at, open, touch};
use super::list::entries;
use super::{Cache, Error};
use crate::format::digest::Digest;
use crate::format::tables::{Checksum, Counts, HEADER_LEN, Header, TablesError};
use crate::io::regular::open_to_read;
use crate::ratelimited_log;

/// Bytes that are verified at a time.
const STEP: usize = 256 << 10;

/// What the cache has of the tables of a stack.
#[derive(Debug)]
pub enum Tables {
    /// They are there, and their checksums are right. The file is open for reading, and locked against
    /// eviction.
    Found(File),
    /// They were not there. The file is empty, open for writing, and locked as long as it is open.
    Created(File),
    /// Another process writes them.
    Busy,
}

/// A tables file in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TablesItem {
    /// Key of the stack, which names the file.
    pub key: Digest,
    /// Bytes of storage it takes.
    pub stored: u64,
    /// Numbers of layers and segments; `None` for a file that is not complete.
    pub counts: Option<Counts>,
    /// Whether a process has it open.
    pub in_use: bool,
    /// When it was opened last.
    pub used: SystemTime,
}

/// A tables file is not valid, or cannot be read.
enum Unfit {
    Tables(TablesError),
    Read(io::Error),
}

impl Cache {
    /// Opens the tables of the stack with this key, and creates an empty file if there are none that
    /// are valid.
    ///
    /// # Errors
    /// [`Error::File`], [`Error::Full`] and [`Error::Locked`] if the system fails.
    pub fn tables(&self, key: &Digest) -> Result<Tables, Error> {
        let path = self.layout.table(key);
        // Damaged files are removed one by one; more than a few of them are made by something else.
        for _ in 0..3 {
            let lock = self.lock()?;
            let Some(file) = open(&path, false)? else {
                return self.create_tables(&path);
            };
            match file.try_lock_shared() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(Tables::Busy),
                Err(TryLockError::Error(error)) => return Err(Error::file("lock", &path)(error)),
            }
            // Verifying takes a while, and others must not wait for it.
            drop(lock);
            match verify(&file, key) {
                Ok(_) => {
                    touch(&file);
                    return Ok(Tables::Found(file));
                }
                Err(Unfit::Read(error)) => return Err(Error::file("read", &path)(error)),
                Err(Unfit::Tables(unfit)) => self.retire_tables(&file, &path, &unfit)?,
            }
        }
        Ok(Tables::Busy)
    }

    /// Creates an empty file. The caller holds the cache's lock.
    fn create_tables(&self, path: &Path) -> Result<Tables, Error> {
        let mut options = File::options();
        options.read(true).write(true).create_new(true).mode(0o444);
        let file = options.open(path).map_err(Error::file("create", path))?;
        file.try_lock()
            .map_err(|error| Error::file("lock", path)(error.into()))?;
        Ok(Tables::Created(file))
    }

    /// Removes a file that is not valid, if its name still leads to it.
    fn retire_tables(&self, file: &File, path: &Path, unfit: &TablesError) -> Result<(), Error> {
        match unfit {
            TablesError::Incomplete => log::debug!("{}: {unfit}", path.display()),
            _ => ratelimited_log::warn(format_args!(
                "removing the image tables {}: {unfit}",
                path.display()
            )),
        }
        let lock = self.lock()?;
        if is_at(file, path)? {
            self.discard_file(path)?;
        }
        drop(lock);
        self.empty_trash()
    }

    /// Lists the tables, by key.
    ///
    /// # Errors
    /// [`Error::File`] if the directory cannot be read.
    pub fn list_tables(&self) -> Result<Vec<TablesItem>, Error> {
        let mut items = Vec::new();
        for (entry, metadata) in entries(&self.layout.tables())? {
            let Some(key) = Digest::from_hex(&entry.file_name().to_string_lossy()) else {
                continue;
            };
            let file = open_to_read(&entry.path()).ok();
            let header = file.as_ref().and_then(|file| header_of(file).ok());
            items.push(TablesItem {
                key,
                stored: metadata.blocks().saturating_mul(512),
                counts: header.map(|header| header.counts),
                in_use: file.is_some_and(|file| file.try_lock().is_err()),
                used: metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH),
            });
        }
        items.sort_by_key(|item| item.key);
        Ok(items)
    }

    /// Verifies the checksums of a tables file, and removes it if it is damaged, or if its writer left
    /// it empty. Returns whether it was right or empty; `None` if there is none with this key, or a
    /// process writes it.
    ///
    /// # Errors
    /// [`Error::File`] and [`Error::Locked`] if the system fails.
    pub fn verify_tables(&self, key: &Digest) -> Result<Option<bool>, Error> {
        let path = self.layout.table(key);
        let Some(file) = open(&path, false)? else {
            return Ok(None);
        };
        if file.try_lock_shared().is_err() {
            return Ok(None);
        }
        match verify(&file, key) {
            Ok(_) => Ok(Some(true)),
            Err(Unfit::Read(error)) => Err(Error::file("read", &path)(error)),
            Err(Unfit::Tables(unfit)) => {
                let len = file
                    .metadata()
                    .map_err(Error::file("examine", &path))?
                    .len();
                self.retire_tables(&file, &path, &unfit)?;
                Ok(Some(len == 0))
            }
        }
    }
}

impl From<TablesError> for Unfit {
    fn from(error: TablesError) -> Self {
        Self::Tables(error)
    }
}

impl From<io::Error> for Unfit {
    fn from(error: io::Error) -> Self {
        Self::Read(error)
    }
}

/// The header of a tables file.
fn header_of(file: &File) -> Result<Header, Unfit> {
    let mut bytes = [0; HEADER_LEN];
    let len = file.metadata()?.len();
    if len < bytes.len() as u64 {
        return Err(TablesError::Incomplete.into());
    }
    file.read_exact_at(&mut bytes, 0)?;
    let (header, _) = Header::decode(&bytes, len)?;
    Ok(header)
}

/// Compares the key and both checksums of a tables file. Reads all of it.
fn verify(file: &File, key: &Digest) -> Result<Header, Unfit> {
    let header = header_of(file)?;
    header.check_key(key)?;
    let mut checksum = Checksum::default();
    let mut buffer = vec![0; STEP];
    let mut at = HEADER_LEN as u64;
    loop {
        match file.read_at(&mut buffer, at) {
            Ok(0) => break,
            Ok(count) => {
                checksum.update(buffer.get(..count).unwrap_or_default());
                at = at.saturating_add(count as u64);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    header.check_content(checksum)?;
    Ok(header)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::cache::{Limits, Removal};

    fn open_cache() -> (tempfile::TempDir, Cache) {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path()).unwrap();
        (dir, cache)
    }

    fn key() -> Digest {
        Digest::of(b"stack")
    }

    /// Writes tables of one layer and one node, and gives up the lock.
    fn fill(file: &File) {
        let counts = Counts {
            layers: 1,
            nodes: 1,
            segments: 3,
            ..Counts::default()
        };
        let layout = counts.layout().unwrap();
        let content = vec![7; layout.len as usize - HEADER_LEN];
        let mut checksum = Checksum::default();
        checksum.update(&content);
        let header = Header {
            key: key(),
            counts,
            content_checksum: checksum.value(),
        };
        file.write_all_at(&content, HEADER_LEN as u64).unwrap();
        file.write_all_at(&header.encode(), 0).unwrap();
        file.unlock().unwrap();
    }

    fn created(cache: &Cache) -> File {
        match cache.tables(&key()).unwrap() {
            Tables::Created(file) => file,
            found => panic!("{found:?}"),
        }
    }

    #[test]
    fn one_process_writes_and_others_find() {
        let (_dir, cache) = open_cache();
        let file = created(&cache);
        assert!(matches!(cache.tables(&key()).unwrap(), Tables::Busy));
        let items = cache.list_tables().unwrap();
        assert_eq!((items[0].counts, items[0].in_use), (None, true));
        assert_eq!(cache.verify_tables(&key()).unwrap(), None);
        fill(&file);
        drop(file);
        let Tables::Found(found) = cache.tables(&key()).unwrap() else {
            panic!("not found");
        };
        let items = cache.list_tables().unwrap();
        assert_eq!(items[0].counts.unwrap().segments, 3);
        assert!(items[0].in_use && items[0].key == key() && items.len() == 1);
        assert_eq!(cache.verify_tables(&key()).unwrap(), Some(true));
        assert_eq!(cache.remove(&key()).unwrap(), Removal::InUse);
        let nothing = Limits {
            bytes: 1,
            free_percent: 0,
            free_bytes: 0,
        };
        assert_eq!(cache.evict(nothing).unwrap().files, 0);
        drop(found);
        assert_eq!(cache.evict(nothing).unwrap().files, 1);
        assert_eq!(cache.verify_tables(&key()).unwrap(), None);
    }

    #[test]
    fn what_a_killed_writer_left_and_what_is_damaged_is_made_anew() {
        let (dir, cache) = open_cache();
        drop(created(&cache));
        assert_eq!(cache.verify_tables(&key()).unwrap(), Some(true), "empty");
        assert!(cache.list_tables().unwrap().is_empty());
        for at in [3, 20, 60, 5000, 5500] {
            drop(created(&cache));
            let file = created(&cache);
            fill(&file);
            file.write_all_at(b"x", at).unwrap();
            drop(file);
            drop(created(&cache));
            let file = created(&cache);
            fill(&file);
            file.write_all_at(b"x", at).unwrap();
            drop(file);
            assert_eq!(cache.verify_tables(&key()).unwrap(), Some(false), "{at}");
        }
        let file = created(&cache);
        fill(&file);
        drop(file);
        let other = Digest::of(b"other");
        let tables = dir.path().join("tables");
        fs::copy(tables.join(key().hex()), tables.join(other.hex())).unwrap();
        let found = cache.tables(&other).unwrap();
        assert!(matches!(found, Tables::Created(_)), "{found:?}");
        assert!(
            fs::read_dir(dir.path().join("trash"))
                .unwrap()
                .next()
                .is_none()
        );
    }
}
