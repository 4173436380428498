//! Snapshots of a device in use, and the list of them that outlives it.
//!
//! A snapshot freezes the active upper and puts an empty one above it, in files of its own beside
//! the first one's. The list `DATA.snapshots`, JSON, names the pairs below the active one; it is
//! replaced in one step while writes wait, and that step is the snapshot: a crash
//! before it leaves the old upper active, and one after it the new one. Sealing the frozen upper comes
//! after, while the guest goes on, and is done again at the next start if it was not finished.
//!
//! Once sealed, a frozen upper is a layer, for everybody: other devices open it at once, and this
//! one when it starts again.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::log::sync_folder_of;
use super::seal::remove_index;
use super::{Error, Options, Paths, Upper, Volume, create};
use crate::format::lsmt::Header;
use crate::image::Image;
use crate::image::spec::Stack;
use crate::units::SECTOR_SIZE;

/// Most bytes of a list that are read.
const MAX_LIST: u64 = 16 << 20;

/// Most bytes of a snapshot's name.
pub const MAX_NAME: usize = 128;

/// A frozen upper, as the list has it. The first one has the files the device was first started
/// with, those after it have the same names with their number behind.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Frozen {
    /// Given by who asked for it.
    name: String,
    uuid: Uuid,
}

/// A snapshot: a layer that holds what was written since the one before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Snapshot {
    /// Given by who asked for it.
    pub name: String,
    /// The layer's uuid.
    pub uuid: Uuid,
    /// The layers that make up the disk as it was, bottom first; the last one is the snapshot's.
    pub layers: Vec<PathBuf>,
}

/// The uppers of a device, and how to make snapshots of it.
#[derive(Debug)]
pub struct Snapshots {
    /// The pair the device was first started with.
    first: Paths,
    options: Options,
    /// The layers below all uppers, bottom first.
    layers: Vec<PathBuf>,
    /// The uppers below the active one, the oldest first.
    frozen: Mutex<Vec<Frozen>>,
}

impl Snapshots {
    /// Opens an image under the upper `first`, or under what snapshots have put above that since.
    /// The upper may hold `limit` bytes of data.
    ///
    /// # Errors
    /// The layers, the uppers or the list cannot be opened, or are damaged.
    pub fn open(stack: &Stack, first: &Paths, limit: u64) -> Result<(Volume, Self), Error> {
        let absolute = |path: &Path| {
            let made = std::path::absolute(path);
            made.map_err(Error::file("find", path))
        };
        let first = Paths {
            data: absolute(&first.data)?,
            index: absolute(&first.index)?,
        };
        let frozen = load(&list_path(&first))?;
        let mut layers = stack.layers().to_vec();
        for number in 0..frozen.len() {
            let paths = numbered(&first, number);
            finish(&paths)?;
            layers.push(paths.data);
        }
        let image = Image::open(&Stack::new(layers))?;
        let options = Options {
            limit,
            default_size: image.sectors().0 * SECTOR_SIZE,
        };
        let upper = Upper::open(&numbered(&first, frozen.len()), &options)?;
        let snapshots = Self {
            first,
            options,
            layers: stack.layers().to_vec(),
            frozen: Mutex::new(frozen),
        };
        Ok((Volume::writable(image, vec![upper]), snapshots))
    }

    /// Whether there were snapshots of a device that was first started with the upper `first`: the
    /// first one's index is gone then.
    pub fn exist(first: &Paths) -> bool {
        list_path(first).exists()
    }

    /// The snapshots, the oldest first.
    pub fn list(&self) -> Vec<Snapshot> {
        let frozen = self.frozen.lock().unwrap_or_else(PoisonError::into_inner);
        let numbers = 0..frozen.len();
        numbers
            .map(|number| self.describe(&frozen, number))
            .collect()
    }

    fn describe(&self, frozen: &[Frozen], number: usize) -> Snapshot {
        let uppers = (0..=number).map(|number| numbered(&self.first, number).data);
        Snapshot {
            name: frozen[number].name.clone(),
            uuid: frozen[number].uuid,
            layers: self.layers.iter().cloned().chain(uppers).collect(),
        }
    }

    /// Freezes what `volume`, which was opened with this, holds now, as the layer of a snapshot of
    /// this name. If there is one of that name already, it is the answer.
    ///
    /// # Errors
    /// Files cannot be made or written. Before the list is replaced all is as it was; after that,
    /// the snapshot stands, and asking again finishes it.
    pub fn take(&self, volume: &Volume, name: &str) -> Result<Snapshot, Error> {
        let mut frozen = self.frozen.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(number) = frozen.iter().position(|known| known.name == name) {
            seal(volume, &numbered(&self.first, number))?;
            return Ok(self.describe(&frozen, number));
        }
        let uppers = volume.uppers();
        let active = uppers.first().ok_or(Error::ReadOnly)?;
        let number = frozen.len();
        let next = numbered(&self.first, number + 1);
        // Left over from one that did not come to its end: the list does not know them.
        remove_index(&next)?;
        remove_if_there(&next.data)?;
        let header = Header {
            uuid: Uuid::new_v4(),
            parent_uuid: active.header().uuid,
            message: Vec::new(),
            ..active.header().clone()
        };
        create(&next, active.kind(), &header)?;
        let upper = Upper::open(&next, &self.options)?;
        let mut after = frozen.clone();
        after.push(Frozen {
            name: name.to_owned(),
            uuid: active.header().uuid,
        });
        volume.freeze(upper, || save(&list_path(&self.first), &after))?;
        *frozen = after;
        seal(volume, &numbered(&self.first, number))?;
        Ok(self.describe(&frozen, number))
    }
}

/// Seals a frozen upper of a device in use, if it is not sealed yet.
fn seal(volume: &Volume, paths: &Paths) -> Result<(), Error> {
    let uppers = volume.uppers();
    let mut frozen = uppers.iter().skip(1);
    match frozen.find(|upper| upper.paths() == paths) {
        Some(upper) if paths.index.exists() => upper.seal(),
        // Sealed, since before this device was started or since the first time it was asked for.
        _ => Ok(()),
    }
}

/// Seals a frozen upper that nobody serves, if that was not finished.
fn finish(paths: &Paths) -> Result<(), Error> {
    let options = Options {
        limit: u64::MAX,
        default_size: 0,
    };
    match paths.index.exists() {
        false => Ok(()),
        true => match Upper::open(paths, &options) {
            Err(Error::Sealed { .. }) => remove_index(paths),
            opened => opened?.seal(),
        },
    }
}

/// Where the list of the uppers that started with `first` is.
fn list_path(first: &Paths) -> PathBuf {
    with_suffix(&first.data, "snapshots")
}

/// The pair with this number.
fn numbered(first: &Paths, number: usize) -> Paths {
    match number {
        0 => first.clone(),
        _ => Paths {
            data: with_suffix(&first.data, &number.to_string()),
            index: with_suffix(&first.index, &number.to_string()),
        },
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(".");
    name.push(suffix);
    name.into()
}

fn remove_if_there(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::file("remove", path)(error))
        }
        _ => Ok(()),
    }
}

/// The list; without a file, there was no snapshot.
fn load(path: &Path) -> Result<Vec<Frozen>, Error> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        opened => opened.map_err(Error::file("open", path))?,
    };
    let mut text = Vec::new();
    file.take(MAX_LIST)
        .read_to_end(&mut text)
        .map_err(Error::file("read", path))?;
    let list = serde_json::from_slice(&text);
    list.map_err(|error| Error::file("understand", path)(error.into()))
}

/// Puts a list in place of the one there is, in one step.
fn save(path: &Path, list: &[Frozen]) -> Result<(), Error> {
    let new = with_suffix(path, "new");
    let text = serde_json::to_vec_pretty(list);
    let text = text.map_err(|error| Error::file("describe", path)(error.into()))?;
    let written = File::create(&new).and_then(|mut file| {
        file.write_all(&text)?;
        file.sync_all()
    });
    written.map_err(Error::file("write", &new))?;
    fs::rename(&new, path).map_err(Error::file("replace", path))?;
    sync_folder_of(path)
}
