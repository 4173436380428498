//! What is in the cache; removing and verifying single blobs.

use std::fs::{self, DirEntry, File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::SystemTime;

use super::layout::{self, partial_named, sync_dir};
use super::{Cache, Error};
use crate::format::digest::{Digest, Hasher};
use crate::format::presence::{Identity, UnitRange};
use crate::io::mapped_file::Access;
use crate::io::regular::open_to_read;
use crate::source::presence::{Bitmap, PresenceMap};

/// Bytes that are hashed at a time.
const STEP: usize = 1 << 20;

/// A blob in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// The blob.
    pub digest: Digest,
    /// Its length in bytes.
    pub len: u64,
    /// Bytes of storage it takes.
    pub stored: u64,
    /// Bytes of the blob that are present.
    pub present: u64,
    /// Whether it is complete and verified.
    pub complete: bool,
    /// Whether a process has it open.
    pub in_use: bool,
    /// When it was opened or filled last.
    pub used: SystemTime,
}

/// What became of a blob that was to be removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// It is gone.
    Removed,
    /// A process has it open.
    InUse,
    /// There is no such blob.
    Absent,
}

impl Cache {
    /// Lists the blobs, complete ones first, by digest.
    ///
    /// # Errors
    /// [`Error::File`] if a directory cannot be read.
    pub fn list(&self) -> Result<Vec<Item>, Error> {
        let mut items = Vec::new();
        for (entry, metadata) in entries(&self.layout.blobs())? {
            if let Some(digest) = Digest::from_hex(&entry.file_name().to_string_lossy()) {
                let len = metadata.len();
                items.push(item(digest, len, len, true, &entry.path(), &metadata));
            }
        }
        for (entry, metadata) in entries(&self.layout.partials())? {
            if let Some(identity) = partial_named(&entry.file_name().to_string_lossy()) {
                let present = self.present(&identity);
                let (digest, len) = (identity.digest(), identity.len());
                items.push(item(digest, len, present, false, &entry.path(), &metadata));
            }
        }
        items.sort_by_key(|item| (!item.complete, item.digest, item.len));
        Ok(items)
    }

    /// Removes what the cache has of a blob, or the tables with this key, unless it is in use.
    ///
    /// # Errors
    /// [`Error::File`] and [`Error::Locked`] if the system fails.
    pub fn remove(&self, digest: &Digest) -> Result<Removal, Error> {
        let lock = self.lock()?;
        let mut outcome = Removal::Absent;
        let mut paths = vec![self.layout.blob(digest), self.layout.table(digest)];
        for (entry, _) in entries(&self.layout.partials())? {
            let identity = partial_named(&entry.file_name().to_string_lossy());
            if identity.is_some_and(|identity| identity.digest() == *digest) {
                paths.push(entry.path());
            }
        }
        for path in paths {
            match self.discard_unused(&path)? {
                Removal::Absent => {}
                found if outcome != Removal::InUse => outcome = found,
                _ => {}
            }
        }
        sync_dir(&self.layout.partials())?;
        drop(lock);
        self.empty_trash()?;
        Ok(outcome)
    }

    /// Compares a complete blob with its digest, and removes it if it is damaged. Returns whether
    /// it is right; `None` if there is no such complete blob.
    ///
    /// # Errors
    /// [`Error::File`] and [`Error::Locked`] if the system fails.
    pub fn verify(&self, digest: &Digest) -> Result<Option<bool>, Error> {
        let path = self.layout.blob(digest);
        let file = match open_to_read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(Error::file("open", &path))?,
        };
        let found = digest_of(&file).map_err(Error::file("read", &path))?;
        if found == *digest {
            return Ok(Some(true));
        }
        self.retire(&file, digest)?;
        Ok(Some(false))
    }

    fn present(&self, identity: &Identity) -> u64 {
        let map = open_to_read(&self.layout.map(identity)).ok();
        let map = map.and_then(|file| PresenceMap::open(&file, *identity, Access::Read).ok());
        let bytes = |map: PresenceMap| {
            let units = map.count(Bitmap::Live);
            let bytes = identity.bytes_of(UnitRange::new(0, units));
            bytes.end - bytes.start
        };
        map.map_or(0, bytes)
    }

    /// Moves a data file and its map to the trash, unless a process has it open. The caller holds
    /// the lock.
    pub(super) fn discard_unused(&self, path: &Path) -> Result<Removal, Error> {
        let file = match open_to_read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Removal::Absent),
            opened => opened.map_err(Error::file("open", path))?,
        };
        if file.try_lock().is_err() {
            return Ok(Removal::InUse);
        }
        if path
            .extension()
            .is_some_and(|extension| extension == "data")
        {
            layout::remove(&path.with_extension("map"))?;
        }
        self.discard_file(path)?;
        Ok(Removal::Removed)
    }

    /// Moves a file to the trash. The caller holds the lock.
    pub(super) fn discard_file(&self, path: &Path) -> Result<(), Error> {
        let name = path.file_name().unwrap_or_default();
        let to = self.layout.trash().join(name);
        fs::rename(path, to).map_err(Error::file("rename", path))
    }

    /// Unlinks what lies in the trash. Long files take a while; the lock is not held.
    pub(super) fn empty_trash(&self) -> Result<(), Error> {
        let trash = self.layout.trash();
        let failed = |error| Error::file("list", &trash)(error);
        for entry in fs::read_dir(&trash).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let is_directory = entry.file_type().is_ok_and(|found| found.is_dir());
            match is_directory {
                true => layout::remove_directory(&entry.path())?,
                false => layout::remove(&entry.path())?,
            }
        }
        Ok(())
    }
}

/// The files of a directory. Those that vanish meanwhile are left out.
pub(super) fn entries(directory: &Path) -> Result<Vec<(DirEntry, Metadata)>, Error> {
    let failed = |error| Error::file("list", directory)(error);
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        match entry.metadata() {
            Ok(metadata) if metadata.is_file() => found.push((entry, metadata)),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
    }
    Ok(found)
}

fn item(
    digest: Digest,
    len: u64,
    present: u64,
    complete: bool,
    path: &Path,
    metadata: &Metadata,
) -> Item {
    // Looked at for a moment only: an eviction meanwhile takes the file for used, and skips it.
    let in_use = open_to_read(path).is_ok_and(|file| file.try_lock().is_err());
    Item {
        digest,
        len,
        present,
        complete,
        in_use,
        stored: metadata.blocks() * 512,
        used: metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH),
    }
}

/// Digest of a file's bytes.
pub(super) fn digest_of(file: &File) -> io::Result<Digest> {
    let mut buffer = vec![0; STEP];
    let mut hasher = Hasher::new();
    let mut offset = 0;
    loop {
        match file.read_at(&mut buffer, offset) {
            Ok(0) => return Ok(hasher.finish()),
            Ok(count) => {
                hasher.update(&buffer[..count]);
                offset += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
