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

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::files::with_suffix;
use super::{Error, Paths};
use crate::io::directory::parent_of;
use crate::io::regular::{create_regular, open_directory, open_to_read};

/// Most bytes of a manifest that are read.
const MAX_MANIFEST: u64 = 16 << 20;

/// The content of the manifest. Pair number 0 has the files that the disk was created with; other pairs have their
/// number appended to the same names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Manifest {
    /// Number of the active pair.
    pub active: u64,
    /// The pairs below it, oldest first.
    pub frozen: Vec<Frozen>,
}

/// A frozen pair.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Frozen {
    /// Name of the snapshot that froze it.
    pub name: String,
    pub uuid: Uuid,
    pub number: u64,
}

impl Manifest {
    /// Reads a manifest. A missing file is that of a disk without snapshots.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be read, or is not a manifest.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let file = match open_to_read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            opened => opened.map_err(Error::file("open", path))?,
        };
        let mut text = Vec::new();
        file.take(MAX_MANIFEST)
            .read_to_end(&mut text)
            .map_err(Error::file("read", path))?;
        let manifest = serde_json::from_slice(&text);
        manifest.map_err(|error| Error::file("parse", path)(error.into()))
    }

    /// The pairs of the disk that was created with `first`.
    pub fn pairs(&self, first: &Paths) -> Pairs {
        let frozen = self.frozen.iter();
        Pairs {
            frozen: frozen.map(|pair| numbered(first, pair.number)).collect(),
            active: numbered(first, self.active),
        }
    }

    /// The pair that the snapshot of this name froze.
    pub fn named(&self, name: &str) -> Option<&Frozen> {
        self.frozen.iter().find(|known| known.name == name)
    }

    /// The manifest after a snapshot: `pair`, which was active, is frozen, and pair number `active` is active.
    pub fn with_frozen(&self, pair: Frozen, active: u64) -> Self {
        let mut frozen = self.frozen.clone();
        frozen.push(pair);
        Self { active, frozen }
    }
}

/// The pairs of files that snapshots made of the pair that a disk was created with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pairs {
    /// The frozen ones, oldest first: the layers right below the active one.
    pub frozen: Vec<Paths>,
    /// The active one.
    pub active: Paths,
}

impl Pairs {
    /// Follows the manifest of the pair `first`. Without a manifest, `first` is the active pair.
    ///
    /// # Errors
    /// [`Error::File`] if the manifest cannot be read.
    pub fn follow(first: &Paths) -> Result<Self, Error> {
        Ok(Manifest::load(&manifest_path(first))?.pairs(first))
    }

    /// Fails if a snapshot froze the pair `first`: what the disk holds now is not in it alone.
    ///
    /// # Errors
    /// [`Error::GoesOn`]; [`Error::File`] if the manifest cannot be read.
    pub fn refuse_frozen(first: &Paths) -> Result<(), Error> {
        let active = Self::follow(first)?.active;
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

/// The path of the manifest of a disk that was created with `first`.
pub(super) fn manifest_path(first: &Paths) -> PathBuf {
    with_suffix(&first.data, "snapshots")
}

/// The pair with this number.
pub(super) fn numbered(first: &Paths, number: u64) -> Paths {
    match number {
        0 => first.clone(),
        _ => Paths {
            data: with_suffix(&first.data, &number.to_string()),
            index: with_suffix(&first.index, &number.to_string()),
        },
    }
}

/// A new manifest under a temporary name. Its content is durable.
pub(super) struct NewManifest {
    path: PathBuf,
    new: PathBuf,
    directory: File,
    /// The old manifest. While it is open, the rename does not free it, which would take ten times as long as the
    /// rename itself.
    _old: Option<File>,
}

impl NewManifest {
    /// Writes the manifest that is to be at `path`.
    ///
    /// # Errors
    /// [`Error::File`]; then no new file is left.
    pub fn write(path: &Path, manifest: &Manifest) -> Result<Self, Error> {
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
