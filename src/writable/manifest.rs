//! The manifest of a disk's snapshots, `DATA.snapshots`: which pairs of files there are, and which one is active.
//!
//! Each process that opens the files reads it; a snapshot replaces it as a whole
//! ([`snapshots`](super::snapshots)).
#![cfg_attr(
    not(test),
    warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)
)]

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::files::with_suffix;
use super::{Error, Paths};
use crate::io::directory::parent_of;
use crate::io::regular::{create_regular, open_directory, open_to_read};

/// Most bytes of a manifest that are read.
const MAX_SNAPSHOT_MANIFEST: u64 = 16 << 20;

/// Content of the manifest. Pair number 0 has the files that the disk was created with; other pairs have their
/// number appended to the same names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Manifest {
    /// Number of the active pair.
    active: u64,
    /// The pairs below it, oldest first.
    frozen: Vec<FrozenPair>,
}

/// A frozen pair.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct FrozenPair {
    /// Name of the snapshot that froze it.
    name: String,
    /// Uuid of the layer.
    uuid: Uuid,
    number: u64,
    /// When the snapshot was taken, in seconds since 1970. Version 0.1 did not record it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    taken: Option<u64>,
}

impl FrozenPair {
    /// Returns the name of the snapshot that froze the pair.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the uuid of the layer.
    pub fn uuid(&self) -> Uuid {
        self.uuid
    }

    /// Returns when the snapshot was taken, in seconds since 1970, if that was recorded.
    pub fn taken(&self) -> Option<u64> {
        self.taken
    }

    /// Returns the files, for the disk that was created with `first`.
    pub fn paths(&self, first: &Paths) -> Paths {
        numbered(first, self.number)
    }
}

impl Manifest {
    /// The written form of a disk whose pair number `active` is above the pairs `frozen`, oldest first.
    pub fn new(frozen: Vec<FrozenPair>, active: u64) -> Self {
        Self { active, frozen }
    }

    /// Returns the number of the active pair.
    pub fn active(&self) -> u64 {
        self.active
    }

    /// Reads a manifest. A disk without snapshots has no such file.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be read, or is not a manifest.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let file = match open_to_read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            opened => opened.map_err(Error::file("open", path))?,
        };
        let mut text = Vec::new();
        file.take(MAX_SNAPSHOT_MANIFEST)
            .read_to_end(&mut text)
            .map_err(Error::file("read", path))?;
        let manifest = serde_json::from_slice(&text);
        manifest.map_err(|error| Error::file("parse", path)(error.into()))
    }

    /// Returns the pairs of the disk that was created with `first`.
    pub fn pairs(&self, first: &Paths) -> Pairs {
        let frozen = self.frozen.iter();
        Pairs {
            frozen: frozen.map(|pair| pair.paths(first)).collect(),
            active: self.active_paths(first),
        }
    }

    /// Returns the files of the active pair, for the disk that was created with `first`.
    pub fn active_paths(&self, first: &Paths) -> Paths {
        numbered(first, self.active)
    }

    /// Returns the frozen pairs, oldest first.
    pub fn frozen(&self) -> &[FrozenPair] {
        &self.frozen
    }

    /// Returns the manifest after the snapshot `name`, and the pair that it freezes: the active one, of the layer
    /// `uuid`. The next pair whose files do not exist is active then. `None` if no number is left.
    pub fn after_snapshot(
        &self,
        name: &str,
        uuid: Uuid,
        first: &Paths,
    ) -> Option<(Self, FrozenPair)> {
        let active = self.free_number(first)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let pair = FrozenPair {
            name: name.to_owned(),
            uuid,
            number: self.active,
            taken: now.ok().map(|now| now.as_secs()),
        };
        let frozen = self.frozen.iter().chain([&pair]).cloned().collect();
        Some((Self { active, frozen }, pair))
    }

    /// Returns the next number of a pair whose files do not exist; `None` if no number is left. Existing files may belong
    /// to a snapshot that was not completed.
    pub fn free_number(&self, first: &Paths) -> Option<u64> {
        let is_free = |number: &u64| {
            let paths = numbered(first, *number);
            !paths.data.exists() && !paths.index.exists()
        };
        (self.active.checked_add(1)?..).find(is_free)
    }

    /// Returns the manifest without the pair at `position`, whose content the next pair has too. That pair, frozen or
    /// active, now has the number `number`.
    pub fn without(&self, position: usize, number: u64) -> Self {
        let mut manifest = self.clone();
        manifest.frozen.remove(position);
        match manifest.frozen.get_mut(position) {
            Some(next) => next.number = number,
            None => manifest.active = number,
        }
        manifest
    }

    /// Returns the manifest of the disk as the pair at `position` was frozen: the pairs above it are not part of it, and
    /// the active pair has the number `active`.
    pub fn back_at(&self, position: usize, active: u64) -> Self {
        let frozen = self.frozen.iter().take(position.saturating_add(1));
        Self::new(frozen.cloned().collect(), active)
    }
}

/// The pairs of files of a disk with snapshots, as its manifest names them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pairs {
    frozen: Vec<Paths>,
    active: Paths,
}

impl Pairs {
    /// Returns the frozen pairs, oldest first: the layers right below the active one.
    pub fn frozen(&self) -> &[Paths] {
        &self.frozen
    }

    /// Returns the active pair.
    pub fn active(&self) -> &Paths {
        &self.active
    }

    /// Reads the manifest of the disk that was created with the pair `first`. Without a manifest, `first` is the active
    /// pair.
    ///
    /// # Errors
    /// [`Error::File`] if the manifest cannot be read.
    pub fn read(first: &Paths) -> Result<Self, Error> {
        Ok(Manifest::load(&manifest_path(first))?.pairs(first))
    }

    /// Fails if a snapshot froze the pair `first`: the present content of the disk is then not in that pair alone.
    ///
    /// # Errors
    /// [`Error::GoesOn`]; [`Error::File`] if the manifest cannot be read.
    pub fn refuse_frozen(first: &Paths) -> Result<(), Error> {
        let active = Self::read(first)?.active;
        match active == *first {
            true => Ok(()),
            false => Err(Error::GoesOn {
                path: first.data.clone(),
                manifest: manifest_path(first),
                active,
            }),
        }
    }
}

/// Returns the path of the manifest of a disk that was created with `first`.
pub(super) fn manifest_path(first: &Paths) -> PathBuf {
    with_suffix(&first.data, "snapshots")
}

/// Returns the files of the pair with this number.
pub(super) fn numbered(first: &Paths, number: u64) -> Paths {
    match number {
        0 => first.clone(),
        _ => Paths {
            data: with_suffix(&first.data, &number.to_string()),
            index: with_suffix(&first.index, &number.to_string()),
        },
    }
}

/// The manifest of a disk in use, as a file. A snapshot needs it exclusively, so that a mutable reference to it is the
/// proof that no other snapshot is taken.
#[derive(Debug)]
pub(super) struct ManifestFile {
    path: PathBuf,
    /// Whether a power loss may bring the previous manifest back, in which a frozen layer is active.
    may_revert: bool,
}

impl ManifestFile {
    /// The manifest of the disk that was created with `first`.
    pub fn new(first: &Paths) -> Self {
        Self {
            path: manifest_path(first),
            may_revert: false,
        }
    }

    /// Writes a new manifest, which is to replace the file.
    ///
    /// # Errors
    /// [`Error::File`]; then no new file is left.
    pub fn prepare(&self, manifest: &Manifest) -> Result<NewManifest, Error> {
        NewManifest::write(&self.path, manifest)
    }

    /// Makes the replacement by `new` durable.
    ///
    /// # Errors
    /// [`Error::File`]; then a power loss may bring the old manifest back.
    pub fn sync(&mut self, new: &NewManifest) -> Result<(), Error> {
        new.sync().inspect_err(|_| self.may_revert = true)
    }

    /// Fails if a power loss may bring an older manifest back: frozen layers must not be sealed then.
    ///
    /// # Errors
    /// [`Error::ManifestMayRevert`].
    pub fn check_durable(&self) -> Result<(), Error> {
        match self.may_revert {
            true => Err(Error::ManifestMayRevert {
                path: self.path.clone(),
            }),
            false => Ok(()),
        }
    }
}

/// A new manifest under a temporary name. Its content is durable.
pub(super) struct NewManifest {
    path: PathBuf,
    new: PathBuf,
    directory: File,
    /// The old manifest. While it is open, the rename does not free it, which would take ten times as long as the
    /// rename.
    _old: Option<File>,
}

impl NewManifest {
    /// Writes the manifest that is to be at `path`.
    fn write(path: &Path, manifest: &Manifest) -> Result<Self, Error> {
        let new = with_suffix(path, "new");
        let text = serde_json::to_vec_pretty(manifest);
        let text = text.map_err(|error| Error::file("encode", path)(error.into()))?;
        let written = create_regular(&new).and_then(|mut file| {
            file.write_all(&text)?;
            file.sync_all()
        });
        let parent = parent_of(path);
        let opened = written
            .map_err(Error::file("write", &new))
            .and_then(|()| open_directory(parent).map_err(Error::file("open", parent)));
        let directory = opened.inspect_err(|_| {
            let _ = fs::remove_file(&new);
        })?;
        Ok(Self {
            path: path.to_owned(),
            new,
            directory,
            _old: open_to_read(path).ok(),
        })
    }

    /// Replaces the old manifest.
    ///
    /// # Errors
    /// [`Error::File`]; then the old manifest stays.
    pub fn put_in_place(&self) -> Result<(), Error> {
        fs::rename(&self.new, &self.path).map_err(|error| {
            let _ = fs::remove_file(&self.new);
            Error::file("replace", &self.path)(error)
        })
    }

    /// Makes the replacement durable.
    ///
    /// # Errors
    /// [`Error::File`]; then a power loss may bring the old manifest back.
    pub fn sync(&self) -> Result<(), Error> {
        let synced = self.directory.sync_all();
        synced.map_err(Error::file("sync", parent_of(&self.path)))
    }
}
