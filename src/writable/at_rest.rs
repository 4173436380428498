//! Snapshots of a disk that no process serves: listed, deleted, and rolled back to.
//!
//! A change prepares new files under a number that no pair has, then replaces the manifest by one rename, then removes
//! the files that the manifest no longer names. A crash before the rename leaves the old disk, a later one the new disk;
//! both may leave files that the manifest does not name.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::time::UNIX_EPOCH;

use uuid::Uuid;

use super::extent_map::ExtentMap;
use super::files::remove_file;
use super::load::{Access, LoadedLayer, load, read_header, waits_for_seal};
use super::manifest::{FrozenPair, Manifest, ManifestFile, NewManifest, manifest_path, numbered};
use super::seal::remove_index;
use super::snapshots::open::complete_seal;
use super::{Error, Paths, create};
use crate::format::lsmt::Header;
use crate::format::lsmt::writable::Kind;
use crate::source::Blob;

/// A snapshot as its files describe it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotFiles {
    /// The name that the client chose.
    pub name: String,
    /// Uuid of its layer.
    pub uuid: Uuid,
    /// The files of its layer; a sealed layer has a data file only.
    pub paths: Paths,
    /// Whether its layer is sealed.
    pub sealed: bool,
    /// When it was taken, in seconds since 1970; for a snapshot of version 0.1, when its layer was last written.
    pub taken: Option<u64>,
    /// Storage of its layer, in bytes. `None`: the data file cannot be examined.
    pub size: Option<u64>,
}

/// Returns the snapshots of the disk that was created with the pair `first`, oldest first. The disk may be in use.
///
/// # Errors
/// [`Error::File`] if the manifest cannot be read.
pub fn list(first: &Paths) -> Result<Vec<SnapshotFiles>, Error> {
    let manifest = Manifest::load(&manifest_path(first))?;
    let frozen = manifest.frozen().iter();
    Ok(frozen.map(|pair| describe(pair, first)).collect())
}

fn describe(pair: &FrozenPair, first: &Paths) -> SnapshotFiles {
    let paths = pair.paths(first);
    let metadata = fs::metadata(&paths.data).ok();
    let written = metadata.as_ref().and_then(|data| data.modified().ok());
    let written = written.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    SnapshotFiles {
        name: pair.name().to_owned(),
        uuid: pair.uuid(),
        sealed: !waits_for_seal(&paths),
        taken: pair.taken().or(written.map(|time| time.as_secs())),
        size: metadata.map(|data| data.blocks().saturating_mul(512)),
        paths,
    }
}

/// A disk with snapshots that no other process uses or changes while this exists.
#[derive(Debug)]
pub struct DiskAtRest {
    first: Paths,
    manifest: Manifest,
    /// Header and kind of the active layer.
    header: Header,
    kind: Kind,
    /// Keeps the data file of the active layer locked.
    _lock: Blob,
}

impl DiskAtRest {
    /// Opens the disk that was created with the pair `first`; also returns its active layer.
    ///
    /// # Errors
    /// [`Error::Busy`] if a process uses the disk; those of [`load`]; [`Error::File`] if the manifest cannot be read.
    pub fn open(first: &Paths) -> Result<(Self, LoadedLayer), Error> {
        let path = manifest_path(first);
        loop {
            let manifest = Manifest::load(&path)?;
            let paths = manifest.active_paths(first);
            let active = load(&paths, Access::Write, ExtentMap::new());
            // Another process may have changed the disk while this one waited for its lock.
            if Manifest::load(&path)? != manifest {
                continue;
            }
            let active = active?;
            let disk = Self {
                first: first.clone(),
                manifest,
                header: active.header().clone(),
                kind: active.kind(),
                _lock: active.data_blob(&paths)?,
            };
            return Ok((disk, active));
        }
    }

    /// Returns the names of the snapshots, oldest first.
    pub fn names(&self) -> Vec<&str> {
        let frozen = self.manifest.frozen().iter();
        frozen.map(FrozenPair::name).collect()
    }

    /// Returns the files of the active layer.
    pub fn active(&self) -> Paths {
        self.manifest.active_paths(&self.first)
    }

    /// Returns the files of the snapshot at `position`. `None`: there is no such snapshot.
    pub fn snapshot(&self, position: usize) -> Option<Paths> {
        let pair = self.manifest.frozen().get(position)?;
        Some(pair.paths(&self.first))
    }

    /// Seals the layers of the snapshots up to `last`, as far as they are not sealed.
    ///
    /// # Errors
    /// Those of a seal, for the first layer that fails.
    pub fn seal_up_to(&self, last: usize) -> Result<(), Error> {
        let frozen = self.manifest.frozen().iter().take(last.saturating_add(1));
        frozen
            .map(|pair| pair.paths(&self.first))
            .try_for_each(|paths| complete_seal(&paths))
    }

    /// Returns a number for new files, and the files.
    ///
    /// # Errors
    /// [`Error::TooTall`] if no number is left.
    pub fn free(&self) -> Result<(u64, Paths), Error> {
        let number = self.manifest.free_number(&self.first);
        let number = number.ok_or(Error::TooTall)?;
        Ok((number, numbered(&self.first, number)))
    }

    /// Deletes the snapshot at `position`. The files of number `number` have its data and that of the layer above it,
    /// durably; they take the place of both.
    ///
    /// # Errors
    /// [`Error::File`] if the manifest cannot be replaced or a file cannot be removed.
    pub fn merge_into_next(self, position: usize, number: u64) -> Result<(), Error> {
        let next = self.snapshot(position.saturating_add(1));
        let old = [self.snapshot(position), Some(next.unwrap_or(self.active()))];
        self.put_in_place(&self.manifest.without(position, number))?
            .sync()?;
        old.iter().flatten().try_for_each(remove)
    }

    /// Makes the disk what it was at the snapshot at `position`: drops what was written since, and the later snapshots.
    ///
    /// # Errors
    /// [`Error::TooTall`], those of [`create`]; [`Error::File`] if a file cannot be read, replaced or removed.
    pub fn roll_back(self, position: usize) -> Result<(), Error> {
        let above = self
            .manifest
            .frozen()
            .iter()
            .skip(position.saturating_add(1));
        let mut old: Vec<_> = above.map(|pair| pair.paths(&self.first)).collect();
        let target = self.snapshot(position).ok_or(Error::TooTall)?;
        // The layer right above was made upon the same stack, and has the record of it.
        let model = match old.first() {
            Some(paths) => header_of(paths)?,
            None => self.header.clone(),
        };
        let header = Header {
            uuid: Uuid::new_v4(),
            virtual_size: header_of(&target)?.virtual_size,
            ..model
        };
        let (number, paths) = self.free()?;
        create(&paths, self.kind, &header)?;
        let new = self.put_in_place(&self.manifest.back_at(position, number));
        let new = new.inspect_err(|_| {
            // Otherwise each attempt would leave another pair.
            let _ = remove(&paths);
        })?;
        new.sync()?;
        old.push(self.active());
        old.iter().try_for_each(remove)
    }

    /// Replaces the manifest. The replacement is not durable yet.
    fn put_in_place(&self, manifest: &Manifest) -> Result<NewManifest, Error> {
        let new = ManifestFile::new(&self.first).prepare(manifest)?;
        new.put_in_place()?;
        Ok(new)
    }
}

/// Reads the header of the data file of a layer, sealed or not.
fn header_of(paths: &Paths) -> Result<Header, Error> {
    let path = &paths.data;
    let data = File::open(path).map_err(Error::file("open", path))?;
    let len = data.metadata().map_err(Error::file("examine", path))?.len();
    Ok(read_header(&data, path, len)?.0)
}

/// Removes the files of a layer.
fn remove(paths: &Paths) -> Result<(), Error> {
    remove_index(paths)?;
    remove_file(&paths.data)
}
