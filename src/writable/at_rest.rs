//! Snapshots of a disk that no process serves: listed, deleted, and rolled back to.
//!
//! A change prepares new files under the number that the manifest reserves for the next pair, then replaces the manifest by
//! one rename, then removes the files that the manifest no longer names. A crash before the rename leaves the old disk, a
//! later one the new disk. The manifest tells in both cases which files are left over; the next start of the daemon and
//! the next change remove them.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, UNIX_EPOCH};

use uuid::Uuid;

use super::extent_map::ExtentMap;
use super::files::sync_names;
use super::load::{Access, LoadedLayer, load, read_header, waits_for_seal};
use super::manifest::{FrozenPair, Manifest, ManifestFile, manifest_path, numbered};
use super::remove::remove_layer;
use super::snapshots::open::complete_seal;
use super::{Error, Paths, create};
use crate::format::lsmt::Header;
use crate::format::lsmt::writable::Kind;
use crate::io::lease::is_open_elsewhere;
use crate::ratelimited_log;
use crate::source::Blob;

/// How long to wait until the kernel has closed the files of a process that ended.
const CLOSE_LIMIT: Duration = Duration::from_millis(500);

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
    file: ManifestFile,
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
    /// [`Error::Busy`] if a process uses the disk; those of [`load`]; [`Error::File`] if the manifest cannot be read, or
    /// leftovers cannot be removed.
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
            manifest.remove_leftovers(first)?;
            let mut file = ManifestFile::new(first, &manifest);
            let manifest = file.forget_replaced(manifest)?;
            let disk = Self {
                first: first.clone(),
                file,
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

    /// Fails if another process has one of the layers from `position` on open, at most `count` of them, that snapshots
    /// froze: a fork of the disk does. Layers with further names (hard links) do not count, because they stay.
    ///
    /// # Errors
    /// [`Error::LayerInUse`]; [`Error::File`] if a layer cannot be opened.
    pub fn refuse_in_use(&self, position: usize, count: usize) -> Result<(), Error> {
        let pairs = self.manifest.frozen().iter().skip(position).take(count);
        for path in pairs.map(|pair| pair.paths(&self.first).data) {
            let file = File::open(&path).map_err(Error::file("open", &path))?;
            let metadata = file.metadata().map_err(Error::file("examine", &path))?;
            let stays = metadata.nlink() > 1;
            if !stays && is_open_elsewhere(&file, CLOSE_LIMIT) == Some(true) {
                return Err(Error::LayerInUse { path });
            }
        }
        Ok(())
    }

    /// Returns the files that the next pair gets. They do not exist; those of an interrupted operation are removed.
    ///
    /// # Errors
    /// [`Error::TooTall`] if no number is left; [`Error::File`] if the manifest or a file cannot be written or removed.
    pub fn reserve(&mut self) -> Result<Paths, Error> {
        let (manifest, paths) = self.file.reserve(self.manifest.clone())?;
        self.manifest = manifest;
        Ok(paths)
    }

    /// Deletes the snapshot at `position`. The files that [`DiskAtRest::reserve`] returned have its data and that of the
    /// layer above it, durably; they take the place of both.
    ///
    /// # Errors
    /// [`Error::TooTall`] if there is no such snapshot or no number is left; [`Error::File`] if the manifest cannot be
    /// replaced.
    pub fn merge_into_next(self, position: usize) -> Result<(), Error> {
        let merged = self.manifest.without(position, &self.first);
        let (manifest, replaced) = merged.ok_or(Error::TooTall)?;
        self.replace(manifest, &replaced)
    }

    /// Makes the disk what it was at the snapshot at `position`: drops what was written since, and the later snapshots.
    ///
    /// # Errors
    /// [`Error::TooTall`] if there is no such snapshot or no number is left; [`Error::LayerInUse`] for a later snapshot; those
    /// of [`create`]; [`Error::File`] if a file cannot be read or replaced.
    pub fn roll_back(mut self, position: usize) -> Result<(), Error> {
        let target = self.snapshot(position).ok_or(Error::TooTall)?;
        self.refuse_in_use(position.saturating_add(1), usize::MAX)?;
        // The layer right above was made upon the same stack, and has the record of it.
        let model = match self.snapshot(position.saturating_add(1)) {
            Some(above) => header_of(&above)?,
            None => self.header.clone(),
        };
        let header = Header {
            uuid: Uuid::new_v4(),
            virtual_size: header_of(&target)?.virtual_size,
            ..model
        };
        let paths = self.reserve()?;
        let rolled_back = self.manifest.back_at(position, &self.first);
        let (manifest, replaced) = rolled_back.ok_or(Error::TooTall)?;
        create(&paths, self.kind, &header)?;
        self.replace(manifest, &replaced)
    }

    /// Replaces the manifest, durably, then removes the pairs number `replaced`.
    fn replace(mut self, manifest: Manifest, replaced: &[u64]) -> Result<(), Error> {
        let new = self.file.prepare(&manifest)?;
        self.file.put_in_place(&new)?;
        self.file.sync(&new)?;
        if let Err(error) = self.remove_replaced(manifest, replaced) {
            ratelimited_log::warn(format_args!(
                "{error}; the next start of the daemon, or the next command, removes the files that are left over"
            ));
        }
        Ok(())
    }

    /// Removes the pairs number `replaced`, then their record in the manifest.
    fn remove_replaced(&mut self, manifest: Manifest, replaced: &[u64]) -> Result<(), Error> {
        let old = replaced.iter().map(|number| numbered(&self.first, *number));
        old.into_iter().try_for_each(|paths| remove_layer(&paths))?;
        sync_names(&self.first)?;
        self.file.forget_replaced(manifest).map(drop)
    }
}

/// Reads the header of the data file of a layer, sealed or not.
fn header_of(paths: &Paths) -> Result<Header, Error> {
    let path = &paths.data;
    let data = File::open(path).map_err(Error::file("open", path))?;
    let len = data.metadata().map_err(Error::file("examine", path))?.len();
    Ok(read_header(&data, path, len)?.0)
}
