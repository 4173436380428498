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
use std::mem;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::files::{remove_file, sync_name, sync_names, with_suffix};
use super::remove::{layer_exists, remove_layer};
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
    #[serde(flatten)]
    unused: UnusedPairs,
}

/// Pairs of files that are not part of the disk. The numbers are recorded before the files are made, or while they are
/// part of the disk, so that the files of an interrupted operation can be told from files that are not the disk's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct UnusedPairs {
    /// Number of the next pair. Files of that number are left from an operation that was interrupted. `None`: not chosen
    /// yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    next: Option<u64>,
    /// Numbers of pairs that others replaced.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    replaced: Vec<u64>,
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
    pub fn new(frozen: Vec<FrozenPair>, active: u64, unused: UnusedPairs) -> Self {
        Self {
            active,
            frozen,
            unused,
        }
    }

    /// Returns the number of the active pair.
    pub fn active(&self) -> u64 {
        self.active
    }

    /// Returns the frozen pairs, oldest first.
    pub fn frozen(&self) -> &[FrozenPair] {
        &self.frozen
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

    /// Returns the manifest with a number for the next pair. `None` if no number is left.
    pub fn with_next(mut self, first: &Paths) -> Option<Self> {
        if self.unused.next.is_none() {
            self.unused.next = Some(self.free_number(first)?);
        }
        Some(self)
    }

    /// Returns a number above those of all pairs, whose files do not exist; `None` if no number is left. Files that
    /// exist may belong to another program.
    fn free_number(&self, first: &Paths) -> Option<u64> {
        let frozen = self.frozen.iter().map(|pair| pair.number);
        let known = frozen.chain(self.unused.numbers()).max();
        let last = known.unwrap_or_default().max(self.active);
        let is_free = |number: &u64| {
            let paths = numbered(first, *number);
            !paths.data.exists() && !paths.index.exists()
        };
        (last.checked_add(1)?..).find(is_free)
    }

    /// Returns the manifest in which the pairs number `replaced` and, as the next one, a new number are not used.
    fn with_unused(mut self, replaced: Vec<u64>, first: &Paths) -> Option<Self> {
        self.unused = UnusedPairs {
            next: None,
            replaced,
        };
        self.with_next(first)
    }

    /// Returns the manifest after the snapshot `name`, and the pair that it freezes: the active one, of the layer `uuid`.
    /// The next pair is active then. `None` if no number is left.
    pub fn after_snapshot(
        &self,
        name: &str,
        uuid: Uuid,
        first: &Paths,
    ) -> Option<(Self, FrozenPair)> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let pair = FrozenPair {
            name: name.to_owned(),
            uuid,
            number: self.active,
            taken: now.ok().map(|now| now.as_secs()),
        };
        let frozen = self.frozen.iter().chain([&pair]).cloned().collect();
        let after = Self::new(frozen, self.unused.next?, UnusedPairs::default());
        let after = after.with_unused(self.unused.replaced.clone(), first)?;
        Some((after, pair))
    }

    /// Returns the manifest without the pair at `position`, and the numbers of the pairs that are replaced: that pair and
    /// the one above it, frozen or active. The next pair, which has the data of both, takes the place of the upper one.
    /// `None` if no number is left.
    pub fn without(&self, position: usize, first: &Paths) -> Option<(Self, Vec<u64>)> {
        let mut manifest = self.clone();
        if position >= manifest.frozen.len() {
            return None;
        }
        let mut replaced = vec![manifest.frozen.remove(position).number];
        let above = match manifest.frozen.get_mut(position) {
            Some(above) => &mut above.number,
            None => &mut manifest.active,
        };
        replaced.push(mem::replace(above, self.unused.next?));
        let manifest = manifest.with_unused(replaced.clone(), first)?;
        Some((manifest, replaced))
    }

    /// Returns the manifest of the disk as the pair at `position` was frozen, and the numbers of the pairs above it, which
    /// are replaced by the next pair. `None` if no number is left.
    pub fn back_at(&self, position: usize, first: &Paths) -> Option<(Self, Vec<u64>)> {
        let (below, above) = self.frozen.split_at_checked(position.checked_add(1)?)?;
        let above = above.iter().map(|pair| pair.number);
        let replaced: Vec<_> = above.chain([self.active]).collect();
        let manifest = Self::new(below.to_vec(), self.unused.next?, UnusedPairs::default());
        let manifest = manifest.with_unused(replaced.clone(), first)?;
        Some((manifest, replaced))
    }

    /// Removes what interrupted operations left beside the disk that was created with `first`. No other process may use
    /// the disk, and this must be its present manifest.
    ///
    /// # Errors
    /// [`Error::File`] if a file cannot be removed.
    pub fn remove_leftovers(&self, first: &Paths) -> Result<(), Error> {
        let manifest = manifest_path(first);
        remove_file(&with_suffix(&manifest, "new"))?;
        let is_used =
            |number| self.active == number || self.frozen.iter().any(|pair| pair.number == number);
        let unused = self.unused.numbers().filter(|number| !is_used(*number));
        let left = unused.map(|number| numbered(first, number));
        let left: Vec<_> = left.filter(layer_exists).collect();
        if left.is_empty() {
            return Ok(());
        }
        // Otherwise a power loss could bring back a manifest that names them.
        sync_name(&manifest)?;
        left.iter().try_for_each(remove_layer)?;
        sync_names(first)
    }
}

impl UnusedPairs {
    fn numbers(&self) -> impl Iterator<Item = u64> {
        self.replaced.iter().copied().chain(self.next)
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
    first: Paths,
    path: PathBuf,
    /// What the file says about pairs that are not part of the disk.
    unused: UnusedPairs,
    /// Whether a power loss may bring the previous manifest back, in which a frozen layer is active.
    may_revert: bool,
}

impl ManifestFile {
    /// The manifest of the disk that was created with `first`, which holds `manifest`.
    pub fn new(first: &Paths, manifest: &Manifest) -> Self {
        Self {
            first: first.clone(),
            path: manifest_path(first),
            unused: manifest.unused.clone(),
            may_revert: false,
        }
    }

    /// Removes the replaced pairs from `manifest`, which the file holds, and from the file. Their own files are removed,
    /// durably: files of these names that appear later are not the disk's.
    ///
    /// # Errors
    /// [`Error::File`] if the manifest cannot be replaced.
    pub fn forget_replaced(&mut self, mut manifest: Manifest) -> Result<Manifest, Error> {
        if !manifest.unused.replaced.is_empty() {
            manifest.unused.replaced.clear();
            let new = self.prepare(&manifest)?;
            self.put_in_place(&new)?;
            self.sync(&new)?;
        }
        Ok(manifest)
    }

    /// Returns what the file says about pairs that are not part of the disk.
    pub fn unused(&self) -> &UnusedPairs {
        &self.unused
    }

    /// Returns `manifest`, which the file holds, with a number for the next pair, and the files of that number. They do
    /// not exist, and the file has the number.
    ///
    /// # Errors
    /// [`Error::TooTall`] if no number is left; [`Error::File`] if the manifest cannot be replaced, or leftovers of an
    /// earlier operation cannot be removed.
    pub fn reserve(&mut self, manifest: Manifest) -> Result<(Manifest, Paths), Error> {
        let is_recorded = manifest.unused.next.is_some();
        let manifest = manifest.with_next(&self.first).ok_or(Error::TooTall)?;
        if !is_recorded {
            let new = self.prepare(&manifest)?;
            self.put_in_place(&new)?;
            // In one directory it is durable with the names of the new files.
            if parent_of(&self.first.index) != parent_of(&self.first.data) {
                self.sync(&new)?;
            }
        }
        let paths = manifest.unused.next.map(|next| numbered(&self.first, next));
        let paths = paths.ok_or(Error::TooTall)?;
        remove_layer(&paths)?;
        Ok((manifest, paths))
    }

    /// Writes a new manifest, which is to replace the file.
    ///
    /// # Errors
    /// [`Error::File`]; then no new file is left.
    pub fn prepare(&self, manifest: &Manifest) -> Result<NewManifest, Error> {
        NewManifest::write(&self.path, manifest)
    }

    /// Replaces the file by `new`. The replacement is not durable yet.
    ///
    /// # Errors
    /// [`Error::File`]; then the old manifest stays.
    pub fn put_in_place(&mut self, new: &NewManifest) -> Result<(), Error> {
        new.put_in_place()?;
        self.unused.clone_from(&new.unused);
        Ok(())
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
    unused: UnusedPairs,
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
            unused: manifest.unused.clone(),
            directory,
            _old: open_to_read(path).ok(),
        })
    }

    fn put_in_place(&self) -> Result<(), Error> {
        fs::rename(&self.new, &self.path).map_err(|error| {
            let _ = fs::remove_file(&self.new);
            Error::file("replace", &self.path)(error)
        })
    }

    fn sync(&self) -> Result<(), Error> {
        let synced = self.directory.sync_all();
        synced.map_err(Error::file("sync", parent_of(&self.path)))
    }
}
