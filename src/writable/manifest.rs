//! The list of a device's snapshots, `DATA.snapshots`: which pairs of files there are, and which of
//! them is written to.
//!
//! It is read by whoever goes by the files, and replaced as a whole by who takes a snapshot
//! ([`snapshots`](super::snapshots)).

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::files::with_suffix;
use super::{Error, Paths};
use crate::io::directory::parent_of;
use crate::io::regular::{create_regular, open_to_read};

/// Most bytes of a list that are read.
const MAX_LIST: u64 = 16 << 20;

/// What the list says. The pair with number 0 has the files the device was first started with; others
/// have the same names with their number behind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Manifest {
    /// The pair that is written to.
    pub active: u64,
    /// Those below it, the oldest first.
    pub frozen: Vec<Frozen>,
}

impl Manifest {
    /// The pairs it tells of, if the device was first started with `first`.
    pub fn pairs(&self, first: &Paths) -> Pairs {
        let frozen = self.frozen.iter();
        Pairs {
            frozen: frozen.map(|pair| numbered(first, pair.number)).collect(),
            active: numbered(first, self.active),
        }
    }
}

/// A frozen upper, as the list has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Frozen {
    /// Given by who asked for it.
    pub name: String,
    pub uuid: Uuid,
    pub number: u64,
}

/// What snapshots have made of the pair of files that a device was first started with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pairs {
    /// Those that are frozen, the oldest first: the layers right below the active one.
    pub frozen: Vec<Paths>,
    /// The one that is written to.
    pub active: Paths,
}

impl Pairs {
    /// Follows the list of the pair `first`. Without a list, that is the active one.
    ///
    /// # Errors
    /// There is a list, and it cannot be read.
    pub fn follow(first: &Paths) -> Result<Self, Error> {
        Ok(load(&list_path(first))?.pairs(first))
    }

    /// Refuses the pair `first` if a snapshot froze it: what the disk holds now is not in it alone.
    ///
    /// # Errors
    /// It is frozen, or the list cannot be read.
    pub fn refuse_frozen(first: &Paths) -> Result<(), Error> {
        let active = Self::follow(first)?.active;
        match active == *first {
            true => Ok(()),
            false => Err(Error::GoesOn {
                path: first.data.clone(),
                list: list_path(first),
                active,
            }),
        }
    }
}

/// Where the list of the uppers that started with `first` is.
pub(super) fn list_path(first: &Paths) -> PathBuf {
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

/// The list; without a file, there was no snapshot.
pub(super) fn load(path: &Path) -> Result<Manifest, Error> {
    let file = match open_to_read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Manifest::default()),
        opened => opened.map_err(Error::file("open", path))?,
    };
    let mut text = Vec::new();
    file.take(MAX_LIST)
        .read_to_end(&mut text)
        .map_err(Error::file("read", path))?;
    let list = serde_json::from_slice(&text);
    list.map_err(|error| Error::file("understand", path)(error.into()))
}

/// A list, written and durable but for its name.
pub(super) struct NewManifest {
    path: PathBuf,
    new: PathBuf,
    folder: File,
    /// The list there is, held so that the file system does not free it while writes wait, which
    /// takes ten times as long as to replace it.
    _old: Option<File>,
}

impl NewManifest {
    /// Writes the list that is to be at `path`.
    pub fn write(path: &Path, list: &Manifest) -> Result<Self, Error> {
        let new = with_suffix(path, "new");
        let text = serde_json::to_vec_pretty(list);
        let text = text.map_err(|error| Error::file("describe", path)(error.into()))?;
        let written = create_regular(&new).and_then(|mut file| {
            file.write_all(&text)?;
            file.sync_all()
        });
        let folder = parent_of(path);
        let opened = written
            .map_err(Error::file("write", &new))
            .and_then(|()| File::open(folder).map_err(Error::file("open", folder)));
        match opened {
            Err(error) => {
                let _ = fs::remove_file(&new);
                Err(error)
            }
            Ok(folder) => Ok(Self {
                path: path.to_owned(),
                new,
                folder,
                _old: open_to_read(path).ok(),
            }),
        }
    }

    /// Puts the list in place of the one there is.
    ///
    /// # Errors
    /// The old list stays.
    pub fn put_in_place(&self) -> Result<(), Error> {
        fs::rename(&self.new, &self.path).map_err(|error| {
            let _ = fs::remove_file(&self.new);
            Error::file("replace", &self.path)(error)
        })
    }

    /// Makes its place last.
    ///
    /// # Errors
    /// It may not stay there.
    pub fn sync(&self) -> Result<(), Error> {
        let synced = self.folder.sync_all();
        synced.map_err(Error::file("sync", parent_of(&self.path)))
    }
}
