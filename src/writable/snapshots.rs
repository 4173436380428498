//! Snapshots of a device in use, and the list of them that outlives it.
//!
//! A snapshot freezes the active upper and puts an empty one above it, in files of its own beside
//! the first one's. The list `DATA.snapshots`, JSON, names the pairs below the active one; it is
//! replaced in one step while writes wait, and that step is the snapshot: a crash before it leaves
//! the old upper active, and one after it the new one. Flushes wait until that lasts. None of this
//! depends on how much the upper holds.
//!
//! [`Snapshots::seal`] makes frozen uppers layers, for everybody. It writes an index, which takes
//! longer the more there is to tell, while guest and device go on; what was not finished is done at
//! the next start. The file of a frozen upper is locked until it is sealed: so who opens it as a
//! layer before knows that it is worth waiting for. The device itself then looks it up as one with
//! those sealed before, and keeps nothing of it but that and its open file.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use uuid::Uuid;

use super::files::sync_name;
use super::locks::{Rank, RankedMutex};
use super::manifest::{Frozen, Manifest, NewManifest, list_path, load, numbered};
use super::seal::remove_index;
use super::{Error, Options, Paths, Volume, WritableLayer, create};
use crate::format::lsmt::{Header, MAX_ENTRIES};
use crate::image::config::Stack;
use crate::image::segment::{MAX_LAYERS, MAX_MAPPINGS};
use crate::image::{Image, OpenStack};
use crate::source::{self, LayerRef};

/// Uppers of a device at a time that are not sealed: each has a map in memory and five open files,
/// and every read looks in it.
const MAX_UPPERS: usize = 16;

/// Most bytes of a snapshot's name.
pub const MAX_NAME: usize = 128;

/// A snapshot: a layer that holds what was written since the one before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Given by who asked for it.
    pub name: String,
    /// The layer's uuid.
    pub uuid: Uuid,
    /// The layers that make up the disk as it was, bottom first; the last one is the snapshot's.
    pub layers: Vec<LayerRef>,
    /// Whether its layer is whole. Until then, who opens it waits.
    pub sealed: bool,
}

/// The uppers of a device, and how to make snapshots of it.
#[derive(Debug)]
pub struct Snapshots {
    /// The pair the device was first started with.
    first: Paths,
    options: Options,
    /// The layers below all uppers, bottom first.
    layers: Vec<LayerRef>,
    /// How many may be open as files.
    max_layers: usize,
    list: RankedMutex<Manifest>,
    /// Held by who seals.
    sealing: RankedMutex<()>,
    /// Whether the last try to seal failed.
    stuck: AtomicBool,
    /// Whether a power loss may bring the list before this one back, in which what is frozen is
    /// active: it must not be sealed then.
    may_return: AtomicBool,
}

impl Snapshots {
    /// Opens the files of `stack`, which may be empty, and loads the disk above it.
    ///
    /// # Errors
    /// Those of [`Stack::open_files`] and [`Snapshots::load`].
    pub fn open(stack: &Stack, first: &Paths, options: Options) -> Result<(Volume, Self), Error> {
        let files = match stack.layers() {
            [] => OpenStack::empty(stack.lineage()),
            _ => stack.open_files()?,
        };
        Self::load(stack, files, first, options)
    }

    /// Loads the disk that starts with the writable layer `first`, or what snapshots have put above
    /// that since. `stack` names the layers below, which are open as `files`; there may be none.
    /// `options` says how the writable layer is used, but for the size of the disk.
    ///
    /// Opens no file outside the directories of `first`, so that a process in its sandbox can do it;
    /// the paths must be absolute then.
    ///
    /// # Errors
    /// Those of [`Image::load`] and [`WritableLayer::open`]; [`Error::File`] if the list of snapshots
    /// cannot be read.
    pub fn load(
        stack: &Stack,
        mut files: OpenStack,
        first: &Paths,
        options: Options,
    ) -> Result<(Volume, Self), Error> {
        let first = Paths {
            data: absolute(&first.data)?,
            index: absolute(&first.index)?,
        };
        let own = stack.layers().iter().map(|layer| {
            let failed = |source| source::Error::Open {
                layer: layer.clone(),
                source,
            };
            layer.absolute().map_err(failed)
        });
        let own: Vec<_> = own.collect::<Result<_, _>>()?;
        let own = Stack::new(own).with_lineage(stack.lineage());
        let path = list_path(&first);
        loop {
            let list = load(&path)?;
            let spare = files.clone();
            let opened = Self::open_as(&first, &own, files, options, &list);
            // Who had the files until now may have taken a snapshot while we waited for them.
            if load(&path)? == list {
                return opened;
            }
            files = spare;
        }
    }

    /// Opens what `list` says.
    fn open_as(
        first: &Paths,
        own: &Stack,
        files: OpenStack,
        options: Options,
        list: &Manifest,
    ) -> Result<(Volume, Self), Error> {
        if *list != Manifest::default() {
            // It may be there without being there for good, and what is done next cannot be undone.
            sync_name(&list_path(first))?;
        }
        let mut sealed: Vec<LayerRef> = Vec::new();
        // One that there is no room to seal stays an upper, and with it all above.
        let (mut unsealed, mut no_room) = (Vec::new(), None);
        let pairs = list.pairs(first);
        for paths in &pairs.frozen {
            if no_room.is_none() {
                match finish(paths) {
                    Err(error) if error.is_full() => no_room = Some(error),
                    finished => {
                        finished?;
                        sealed.push(paths.data.clone().into());
                        continue;
                    }
                }
            }
            match (
                WritableLayer::open(paths, &Options::default()),
                no_room.take(),
            ) {
                (Err(Error::Sealed { .. }), Some(error)) => return Err(error),
                (opened, error) => {
                    unsealed.push(opened?);
                    no_room = error;
                }
            }
        }
        if let Some(error) = no_room {
            log::warn!("cannot complete the layer of a snapshot: {error}");
        }
        let files = files.below(&sealed)?;
        let image = match files.is_empty() {
            true => Image::empty(),
            false => Image::load(files)?,
        };
        let options = Options {
            default_size: image.at_own_size().sectors().bytes(),
            ..options
        };
        let upper = WritableLayer::open(&pairs.active, &options)?;
        let lowest = unsealed.first().unwrap_or(&upper);
        let named = LayerRef::from(&lowest.paths().data);
        image.check_child(named, &lowest.header())?;
        let snapshots = Self {
            first: first.clone(),
            options,
            layers: own.layers().to_vec(),
            max_layers: source::make_room(MAX_LAYERS),
            list: RankedMutex::new(Rank::Manifest, list.clone()),
            sealing: RankedMutex::new(Rank::Seal, ()),
            stuck: AtomicBool::new(!unsealed.is_empty()),
            may_return: AtomicBool::new(false),
        };
        let uppers = [upper].into_iter().chain(unsealed.into_iter().rev());
        Ok((Volume::writable(image, uppers.collect()), snapshots))
    }

    /// The snapshots of `volume`, which was opened with this, the oldest first.
    pub fn list(&self, volume: &Volume) -> Vec<Snapshot> {
        let list = self.list.lock();
        let numbers = 0..list.frozen.len();
        let describe = |number| self.describe(volume, &list, number);
        numbers.map(describe).collect()
    }

    /// The snapshot at this place of the list.
    fn describe(&self, volume: &Volume, list: &Manifest, place: usize) -> Snapshot {
        let frozen = list.frozen.iter().take(place + 1);
        let uppers = frozen.map(|frozen| numbered(&self.first, frozen.number).data.into());
        let paths = numbered(&self.first, list.frozen[place].number);
        let upper = frozen_upper(volume, &paths);
        Snapshot {
            name: list.frozen[place].name.clone(),
            uuid: list.frozen[place].uuid,
            layers: self.layers.iter().cloned().chain(uppers).collect(),
            sealed: upper.is_none_or(|upper| upper.is_sealed()),
        }
    }

    /// Freezes what `volume`, which was opened with this, holds now, durably, as the layer of a
    /// snapshot of this name; it is still to be sealed. If there is one of that name already, it is
    /// the answer.
    ///
    /// # Errors
    /// Files cannot be made or written, or there are as many layers as there may be. Before the
    /// list is replaced all is as it was; after that, the snapshot stands. If the last
    /// [`Snapshots::seal`] failed, it is done again first: no snapshot is on top of one that has no
    /// layer to come. So it is if much waits for it: what is not sealed takes memory.
    pub fn take(&self, volume: &Volume, name: &str) -> Result<Snapshot, Error> {
        let named = |list: &Manifest| list.frozen.iter().position(|known| known.name == name);
        // A snapshot that stands is the answer, even if no other can be taken.
        let is_there = named(&self.list.lock()).is_some();
        if !is_there && (self.stuck.load(Ordering::Acquire) || much_is_unsealed(&volume.layers())) {
            self.seal(volume)?;
        }
        let mut list = self.list.lock();
        if let Some(place) = named(&list) {
            return Ok(self.describe(volume, &list, place));
        }
        let uppers = volume.layers();
        let active = uppers.first().ok_or(Error::ReadOnly)?;
        self.has_room(volume)?;
        // Files that are there belong to somebody, if only to a snapshot that was not finished.
        let is_free = |number: &u64| {
            let paths = numbered(&self.first, *number);
            !paths.data.exists() && !paths.index.exists()
        };
        let number = (list.active + 1..).find(is_free).ok_or(Error::TooTall)?;
        let next = numbered(&self.first, number);
        let header = Header {
            uuid: Uuid::new_v4(),
            parent_uuid: active.header().uuid,
            message: Vec::new(),
            ..(*active.header()).clone()
        };
        let mut after = list.clone();
        after.frozen.push(Frozen {
            name: name.to_owned(),
            uuid: active.header().uuid,
            number: list.active,
        });
        after.active = number;
        create(&next, active.kind(), &header)?;
        let settled = self.go_on_above(volume, &next, &after).inspect_err(|_| {
            // Else every try would leave another pair.
            let _ = remove_index(&next);
            let _ = fs::remove_file(&next.data);
        })?;
        *list = after;
        if let Err(error) = settled {
            self.may_return.store(true, Ordering::Release);
            self.stuck.store(true, Ordering::Release);
            return Err(error);
        }
        // What was written since `go_on_above` flushed.
        if let Err(error) = active.flush() {
            self.stuck.store(true, Ordering::Release);
            return Err(error);
        }
        Ok(self.describe(volume, &list, list.frozen.len() - 1))
    }

    /// Makes `volume`, which was opened with this, `size` bytes large, durably, before any reader or writer sees
    /// it. Snapshots keep the size they have. That it has this size already is no error.
    ///
    /// # Errors
    /// [`Error::ReadOnly`], [`Error::Shrinks`], [`Error::Size`]; those of storage, after which the disk has the
    /// size it had, and the next start finds that or the new one.
    pub fn grow(&self, volume: &Volume, size: u64) -> Result<(), Error> {
        // A snapshot would put a layer of the old size above.
        let _list = self.list.lock();
        volume.grow(size)
    }

    /// Seals what is frozen of `volume`, in order: a layer above one that is not sealed would be of
    /// no use to anybody. Waits for who is at it already.
    ///
    /// # Errors
    /// A file cannot be written or made durable, or it is not certain that the list lasts.
    pub fn seal(&self, volume: &Volume) -> Result<(), Error> {
        let _alone = self.sealing.lock();
        // Not before it is certain that the list lasts which says that they are frozen.
        let uppers = {
            let _list = self.list.lock();
            volume.layers()
        };
        let sealed = match self.may_return.load(Ordering::Acquire) {
            true => Err(Error::ListMayReturn {
                path: list_path(&self.first),
            }),
            false => {
                let frozen: Vec<_> = uppers.into_iter().skip(1).rev().collect();
                let failed = frozen.iter().enumerate().find_map(|(number, upper)| {
                    let error = upper.seal().err()?;
                    Some((number, error))
                });
                let sealed = failed.as_ref().map_or(frozen.len(), |(number, _)| *number);
                let folded = volume.fold(&frozen[..sealed]);
                failed.map_or(folded, |(_, error)| Err(error))
            }
        };
        self.stuck.store(sealed.is_err(), Ordering::Release);
        sealed
    }

    /// Freezes the active upper and puts that of `next` above it, which `after` says. The inner
    /// error is that of a list that may not last.
    fn go_on_above(
        &self,
        volume: &Volume,
        next: &Paths,
        after: &Manifest,
    ) -> Result<Result<(), Error>, Error> {
        let upper = WritableLayer::open(next, &self.options)?;
        // Everything that takes long comes before, so that writes wait for a moment only.
        volume.flush()?;
        let new = NewManifest::write(&list_path(&self.first), after)?;
        volume.freeze(upper, || new.put_in_place(), || new.sync())
    }

    /// Refuses a snapshot after which the device, or another on its layers, could not be opened.
    fn has_room(&self, volume: &Volume) -> Result<(), Error> {
        let image = volume.image().layers();
        let mappings = image.iter().map(|layer| layer.trailer().index_entries);
        let mappings = mappings.sum::<u64>() + volume.mappings();
        // The active upper becomes one.
        let layers = image.len() + volume.frozen() + 1;
        if layers > MAX_LAYERS || mappings > MAX_MAPPINGS {
            return Err(Error::TooTall);
        }
        match layers > self.max_layers {
            true => Err(Error::TooManyFiles(self.max_layers)),
            false => Ok(()),
        }
    }
}

/// Whether what is not sealed is as much as may be kept in memory beside a new upper.
fn much_is_unsealed(uppers: &[Arc<WritableLayer>]) -> bool {
    let mappings: u64 = uppers.iter().map(|upper| upper.mappings()).sum();
    uppers.len() > 1 && (uppers.len() >= MAX_UPPERS || mappings > MAX_ENTRIES)
}

/// The frozen upper with these files, if the device still has it as one.
fn frozen_upper(volume: &Volume, paths: &Paths) -> Option<Arc<WritableLayer>> {
    let uppers = volume.layers();
    let mut frozen = uppers.iter().skip(1);
    frozen.find(|upper| upper.paths() == paths).cloned()
}

/// Seals a frozen upper that nobody serves, if that was not finished.
fn finish(paths: &Paths) -> Result<(), Error> {
    match paths.index.exists() {
        false => Ok(()),
        true => match WritableLayer::open(paths, &Options::default()) {
            Err(Error::Sealed { .. }) => remove_index(paths),
            opened => opened?.seal(),
        },
    }
}

fn absolute(path: &Path) -> Result<PathBuf, Error> {
    std::path::absolute(path).map_err(Error::file("find", path))
}
