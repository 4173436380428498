//! Opening what the cache has of a blob.

use std::fs::{File, Permissions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use super::layout::{self, sync_dir};
use super::{Cache, Error, Partial, list};
use crate::format::digest::Digest;
use crate::format::presence::{Header, Identity};
use crate::io::mapped_file::Access;
use crate::io::regular::open_regular;
use crate::ratelimited_log;
use crate::source::presence::{self, PresenceMap};

/// What the cache has of a blob.
#[derive(Clone, Debug)]
pub enum Entry {
    /// All of it, verified. The file is open for reading and locked against eviction.
    Complete(Arc<File>),
    /// A part of it, perhaps nothing yet.
    Partial(Arc<Partial>),
}

/// Descriptors of a partial blob for a process that only reads it.
#[derive(Debug)]
pub struct Files {
    /// Data file, open for reading and locked against eviction.
    pub data: File,
    /// Presence map, open for reading.
    pub map: File,
}

impl Cache {
    /// Opens what the cache has of a blob, and makes an empty entry if that is nothing.
    ///
    /// # Errors
    /// [`Error::Length`] if a verified blob of this digest has another length;
    /// [`Error::Full`] if there is no room for a new entry; [`Error::Locked`] if another process
    /// holds the cache's lock for long; [`Error::File`] and [`Error::Map`] if the system fails.
    pub fn entry(&self, identity: Identity) -> Result<Entry, Error> {
        loop {
            let lock = self.lock()?;
            self.displace_special(&identity)?;
            if let Some(file) = self.complete(&identity)? {
                let found = file
                    .metadata()
                    .map_err(Error::file(
                        "examine",
                        &self.layout.blob(&identity.digest()),
                    ))?
                    .len();
                if found == identity.len() {
                    return Ok(Entry::Complete(Arc::new(file)));
                }
                // Either the caller's length is wrong, or the file is damaged: its digest tells.
                // That takes a while, and others must not wait for it.
                drop(lock);
                if list::digest_of(&file).map_err(Error::file("read", self.root()))?
                    == identity.digest()
                {
                    return Err(Error::Length {
                        digest: identity.digest(),
                        expected: identity.len(),
                        found,
                    });
                }
                ratelimited_log::warn(format_args!(
                    "blob {} in the cache is damaged: {found} bytes; it will be fetched again",
                    identity.digest()
                ));
                self.retire(&file, &identity.digest())?;
                continue;
            }
            let partial = match self.existing(&identity)? {
                Some(partial) => partial,
                None => self.create(identity)?,
            };
            return Ok(Entry::Partial(Arc::new(partial)));
        }
    }

    /// Removes what is no regular file from the names of a blob: a start would fail on it for ever. The
    /// caller holds the lock.
    fn displace_special(&self, identity: &Identity) -> Result<(), Error> {
        for path in [
            self.layout.blob(&identity.digest()),
            self.layout.data(identity),
            self.layout.map(identity),
        ] {
            let Ok(found) = std::fs::symlink_metadata(&path) else {
                continue;
            };
            if found.is_file() {
                continue;
            }
            ratelimited_log::warn(format_args!(
                "{} is not a regular file; removing it",
                path.display()
            ));
            match found.is_dir() {
                // It may hold much.
                true => self.discard_file(&path)?,
                false => layout::remove(&path)?,
            }
        }
        Ok(())
    }

    /// Length of a complete blob; `None` if there is none of this digest.
    pub fn complete_len(&self, digest: &Digest) -> Option<u64> {
        let metadata = std::fs::metadata(self.layout.blob(digest)).ok()?;
        metadata.is_file().then_some(metadata.len())
    }

    /// The verified file of a blob, locked against eviction; its length was not looked at.
    fn complete(&self, identity: &Identity) -> Result<Option<File>, Error> {
        let path = self.layout.blob(&identity.digest());
        let Some(file) = open(&path, false)? else {
            return Ok(None);
        };
        hold(&file, &path)?;
        Ok(Some(file))
    }

    /// Moves a damaged complete blob away, if its name still leads to `file`. Processes that have
    /// it open keep it.
    pub(super) fn retire(&self, file: &File, digest: &Digest) -> Result<(), Error> {
        let path = self.layout.blob(digest);
        let lock = self.lock()?;
        if is_at(file, &path)? {
            self.discard_file(&path)?;
            sync_dir(&self.layout.blobs())?;
        }
        drop(lock);
        self.empty_trash()
    }

    /// The partial entry of a blob, open for filling. The caller holds the lock.
    pub(super) fn existing(&self, identity: &Identity) -> Result<Option<Partial>, Error> {
        let (data_path, map_path) = (self.layout.data(identity), self.layout.map(identity));
        let (data, map) = (open(&data_path, true)?, open(&map_path, true)?);
        let (data, map_file) = match (data, map) {
            (Some(data), Some(map)) => (data, map),
            (None, None) => return Ok(None),
            _ => return self.begin_again(identity, "the data file or the presence map is missing"),
        };
        let metadata = data.metadata();
        let len = metadata.map_err(Error::file("examine", &data_path))?.len();
        if len != identity.len() {
            return self.begin_again(identity, "the data file has a wrong length");
        }
        let opened = PresenceMap::open(&map_file, *identity, Access::ReadWrite);
        let opened = opened.and_then(|map| map.header().map(|header| (map, header)));
        let (map, header) = match opened {
            Ok(opened) => opened,
            Err(presence::Error::Map(source)) => {
                let source = presence::Error::Map(source);
                let path = map_path;
                return Err(Error::Map { path, source });
            }
            Err(unfit) => return self.begin_again(identity, &unfit.to_string()),
        };
        if header.boot != self.boot || self.boot.is_nil() {
            map.forget_unsynced();
            map.set_boot(self.boot);
        }
        self.partial(data, map_file, map).map(Some)
    }

    /// Removes a partial entry that is of no use. The map goes first, and for good: with data of
    /// another entry it would turn holes into content.
    fn begin_again(&self, identity: &Identity, why: &str) -> Result<Option<Partial>, Error> {
        let digest = identity.digest();
        ratelimited_log::warn(format_args!(
            "blob {digest} in the cache is damaged and will be fetched again: {why}"
        ));
        layout::remove(&self.layout.map(identity))?;
        sync_dir(&self.layout.partials())?;
        layout::remove(&self.layout.data(identity))?;
        Ok(None)
    }

    /// Makes an empty entry, or nothing.
    fn create(&self, identity: Identity) -> Result<Partial, Error> {
        let created = self.create_files(identity);
        if created.is_err() {
            // No later opening must take half an entry for a damaged one.
            layout::remove(&self.layout.map(&identity))?;
            layout::remove(&self.layout.data(&identity))?;
        }
        created
    }

    fn create_files(&self, identity: Identity) -> Result<Partial, Error> {
        let data_path = self.layout.data(&identity);
        let data = create(&data_path)?;
        data.set_len(identity.len())
            .map_err(Error::file("lengthen", &data_path))?;
        let (map_file, map) = self.create_map(&identity)?;
        self.partial(data, map_file, map)
    }

    /// Creates a map without units.
    pub(super) fn create_map(&self, identity: &Identity) -> Result<(File, PresenceMap), Error> {
        let path = self.layout.map(identity);
        let mut file = create(&path)?;
        write_map(&mut file, identity).map_err(Error::file("write", &path))?;
        let map = PresenceMap::open(&file, *identity, Access::ReadWrite);
        let map = map.map_err(|source| Error::Map { path, source })?;
        map.set_boot(self.boot);
        Ok((file, map))
    }

    fn partial(&self, data: File, map_file: File, map: PresenceMap) -> Result<Partial, Error> {
        let identity = map.identity();
        let (data_path, map_path) = (self.layout.data(identity), self.layout.map(identity));
        let missing = || io::Error::from(io::ErrorKind::NotFound);
        let reopen = |path: &Path| {
            let opened = open(path, false)?;
            opened.ok_or_else(|| Error::file("open", path)(missing()))
        };
        let files = Files {
            data: reopen(&data_path)?,
            map: reopen(&map_path)?,
        };
        hold(&files.data, &data_path)?;
        Ok(Partial::new(
            self.layout.clone(),
            data,
            map_file,
            map,
            files,
        ))
    }
}

pub(super) fn open(path: &Path, write: bool) -> Result<Option<File>, Error> {
    let mut options = File::options();
    options.read(true).write(write);
    match open_regular(path, options) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        opened => Ok(Some(opened.map_err(Error::file("open", path))?)),
    }
}

fn create(path: &Path) -> Result<File, Error> {
    let mut options = File::options();
    let created = options.read(true).write(true).create_new(true).open(path);
    let file = created.map_err(Error::file("create", path))?;
    file.set_permissions(Permissions::from_mode(0o600))
        .map_err(Error::file("chmod", path))?;
    Ok(file)
}

/// Writes an empty map. All of it is allocated now: later, a full disk would be a fault in the
/// mapping.
fn write_map(file: &mut File, identity: &Identity) -> io::Result<()> {
    let mut header = Header::new_map(identity);
    header.resize(1 << 16, 0);
    let mut left = identity.map_len();
    while left > 0 {
        let part = left.min(header.len() as u64) as usize;
        file.write_all(&header[..part])?;
        left -= part as u64;
        if left > 0 {
            header.fill(0);
        }
    }
    Ok(())
}

/// Locks a data file against eviction and notes that it was used now. The caller holds the cache's lock, as
/// eviction does. Only a reader that was taken over has an exclusive lock: it has the descriptor of the file.
/// Such a lock keeps eviction away just as well, and must not keep other readers away.
fn hold(file: &File, path: &Path) -> Result<(), Error> {
    match file.try_lock_shared() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            ratelimited_log::warn(format_args!(
                "a reader of {} locked it exclusively",
                path.display()
            ));
        }
        Err(TryLockError::Error(error)) => return Err(Error::file("lock", path)(error)),
    }
    touch(file);
    Ok(())
}

/// Notes that a file was used now. Eviction takes the least recently used first; a file system
/// that does not take the time does no harm.
pub(super) fn touch(file: &File) {
    if let Err(error) = file.set_modified(SystemTime::now()) {
        log::debug!("cannot set the access time of a cached blob: {error}");
    }
}

/// Whether `path` leads to the open `file`.
pub(super) fn is_at(file: &File, path: &Path) -> Result<bool, Error> {
    let failed = |error| Error::file("examine", path)(error);
    let own = file.metadata().map_err(failed)?;
    match std::fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        found => {
            let found = found.map_err(failed)?;
            Ok((found.dev(), found.ino()) == (own.dev(), own.ino()))
        }
    }
}

/// Whether two open files are one.
pub(super) fn same_file(one: &File, other: &File) -> Result<bool, Error> {
    let failed = |error| Error::file("examine", Path::new("a cached blob"))(error);
    let [one, other] = [one, other].map(|file| file.metadata().map_err(failed));
    let (one, other) = (one?, other?);
    Ok((one.dev(), one.ino()) == (other.dev(), other.ino()))
}

impl Entry {
    /// Whether all of the blob is there, verified.
    pub fn is_complete(&self) -> bool {
        matches!(self, Self::Complete(_))
    }
}
