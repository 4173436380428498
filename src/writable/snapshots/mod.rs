//! Snapshots of a disk in use.
//!
//! A snapshot freezes the active layer and puts an empty one above it, in files of its own beside the first pair.
//! The manifest `DATA.snapshots` names the active pair and the frozen ones. It is replaced by one rename while writes
//! wait, and that rename is the snapshot: after an earlier crash the old layer is active, after a later one the
//! new layer. Flushes wait until the rename is durable. The duration does not depend on the amount of data.
//!
//! [`Snapshots::seal`] turns frozen layers into read-only ones, which any process can open. It writes the index
//! of each layer while the disk is in use; an interrupted seal is completed at the
//! next start. The data file of a frozen layer is locked until it is sealed, so that a process that opens it as a
//! layer waits. The disk then folds the layer into those sealed before, and keeps only their common index and the open
//! files.

mod open;

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use uuid::Uuid;

use super::locks::RankedMutex;
use super::manifest::{FrozenPair, Manifest, NewManifest, manifest_path};
use super::seal::remove_index;
use super::{Error, Options, Paths, Volume, WritableLayer, create};
use crate::format::lsmt::{Header, MAX_ENTRIES};
use crate::image::identity::{LayerId, StackId};
use crate::image::made_upon::MadeUpon;
use crate::image::segment::{MAX_LAYERS, MAX_MAPPINGS};
use crate::source::LayerRef;

/// Most writable layers of a disk that are not sealed: each has a map in memory and five open files, and every read
/// searches it.
const MAX_UNSEALED: usize = 16;

/// Most bytes of a snapshot's name.
pub const MAX_NAME: usize = 128;

/// A snapshot: a layer that holds what was written since the previous one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The name that the client chose.
    pub name: String,
    /// The layer's uuid.
    pub uuid: Uuid,
    /// The layers that make up the disk as it was, bottom first; the last one is the snapshot's.
    pub layers: Vec<LayerRef>,
    /// Whether the layer is sealed. A process that opens it waits until it is.
    pub sealed: bool,
}

/// The snapshots of a disk.
#[derive(Debug)]
pub struct Snapshots {
    volume: Arc<Volume>,
    /// The pair of files that the disk was created with.
    first: Paths,
    options: Options,
    /// The layers below all writable ones, bottom first.
    lower: Vec<LayerRef>,
    /// Most layers that may be open as files.
    max_layers: usize,
    manifest: RankedMutex<Manifest>,
    /// Held while layers are sealed.
    sealing: RankedMutex<()>,
    /// Whether the last attempt to seal failed.
    seal_failed: AtomicBool,
    /// Whether a power loss may bring the previous manifest back, in which a frozen layer is active: it must not be
    /// sealed then.
    manifest_may_revert: AtomicBool,
}

impl Snapshots {
    /// Returns the snapshots, oldest first.
    pub fn list(&self) -> Vec<Snapshot> {
        let manifest = self.manifest.lock();
        let pairs = manifest.with_below();
        pairs
            .map(|(pair, below)| self.describe(pair, below))
            .collect()
    }

    /// The snapshot of this name.
    fn find(&self, manifest: &Manifest, name: &str) -> Option<Snapshot> {
        let mut pairs = manifest.with_below();
        let (pair, below) = pairs.find(|(pair, _)| pair.name() == name)?;
        Some(self.describe(pair, below))
    }

    /// The snapshot that froze `pair`, which is above the frozen pairs `below`.
    fn describe(&self, pair: &FrozenPair, below: &[FrozenPair]) -> Snapshot {
        let data_file = |pair: &FrozenPair| LayerRef::from(pair.paths(&self.first).data);
        let frozen = below.iter().chain([pair]).map(data_file);
        let layer = self.frozen_layer(&pair.paths(&self.first));
        Snapshot {
            name: pair.name().to_owned(),
            uuid: pair.uuid(),
            layers: self.lower.iter().cloned().chain(frozen).collect(),
            sealed: layer.is_none_or(|layer| layer.is_sealed()),
        }
    }

    /// The frozen layer with these files, if the disk has not folded it.
    fn frozen_layer(&self, paths: &Paths) -> Option<Arc<WritableLayer>> {
        let layers = self.volume.layers();
        let mut frozen = layers.into_iter().skip(1);
        frozen.find(|layer| layer.paths() == paths)
    }

    /// Freezes the present content of the disk, durably, as a snapshot of this name, which is not sealed yet. Returns
    /// the existing snapshot if there is one of that name.
    ///
    /// If the last [`Snapshots::seal`] failed, or many layers are not sealed, seals them first: a snapshot needs
    /// sealed layers below it, and each layer that is not sealed takes memory.
    ///
    /// # Errors
    /// [`Error::TooTall`] and [`Error::TooManyFiles`] at the limit of layers; those of [`Snapshots::seal`];
    /// [`Error::File`] and [`Error::Bytes`] if a file cannot be written. An error before the manifest is replaced leaves
    /// the disk unchanged; after a later one, the snapshot exists.
    pub fn take(&self, name: &str) -> Result<Snapshot, Error> {
        let is_known = self.find(&self.manifest.lock(), name).is_some();
        if !is_known && (self.seal_failed.load(Ordering::Acquire) || self.much_is_unsealed()) {
            self.seal()?;
        }
        let mut manifest = self.manifest.lock();
        match self.find(&manifest, name) {
            Some(snapshot) => Ok(snapshot),
            None => self.take_new(&mut manifest, name),
        }
    }

    /// Takes a snapshot of a new name.
    fn take_new(&self, manifest: &mut Manifest, name: &str) -> Result<Snapshot, Error> {
        let layers = self.volume.layers();
        let active = layers.first().ok_or(Error::ReadOnly)?;
        self.check_room()?;
        // The snapshot's layer and the record of the one above it must name the same size.
        active.restore_size()?;
        let next = manifest.after_snapshot(name, active.header().uuid, &self.first);
        let (next, pair) = next.ok_or(Error::TooTall)?;
        let durable = self.freeze(active, &next)?;
        let snapshot = self.describe(&pair, manifest.frozen());
        *manifest = next;
        if durable.is_err() {
            self.manifest_may_revert.store(true, Ordering::Release);
        }
        // Writes may have arrived since the flush before the freeze.
        let flushed = durable.and_then(|()| active.flush());
        flushed.inspect_err(|_| self.seal_failed.store(true, Ordering::Release))?;
        Ok(snapshot)
    }

    /// Creates the active pair of `manifest` and puts it above the layer `active`, which it freezes. The inner
    /// error is that of a manifest that may not be durable.
    fn freeze(
        &self,
        active: &WritableLayer,
        manifest: &Manifest,
    ) -> Result<Result<(), Error>, Error> {
        let paths = manifest.active_paths(&self.first);
        let below = active.header();
        let record = self.made_upon(manifest, below.virtual_size)?;
        let header = Header {
            uuid: Uuid::new_v4(),
            parent_uuid: below.uuid,
            message: record
                .and_then(|record| record.message(b""))
                .unwrap_or_default(),
            ..(*below).clone()
        };
        create(&paths, active.kind(), &header)?;
        self.put_above(&paths, manifest).inspect_err(|_| {
            // Otherwise each attempt would leave another pair.
            let _ = remove_index(&paths);
            let _ = fs::remove_file(&paths.data);
        })
    }

    /// The record of a layer above the frozen ones of `manifest`, which make up a disk of `size` bytes. `None`: a
    /// writable layer has no uuid, and samples of its data are not final before it is sealed.
    fn made_upon(&self, manifest: &Manifest, size: u64) -> Result<Option<MadeUpon>, Error> {
        let image = self.volume.image();
        // The image has those that were sealed when the disk was opened.
        let sealed = image.layers().len().saturating_sub(self.lower.len());
        let frozen = manifest.frozen().iter().skip(sealed);
        let ids: Option<Vec<_>> = frozen.map(|pair| LayerId::named(pair.uuid())).collect();
        let Some(ids) = ids else { return Ok(None) };
        let stack = ids.into_iter().fold(image.stack_id()?, StackId::below);
        Ok(Some(MadeUpon { stack, size }))
    }

    fn put_above(&self, paths: &Paths, manifest: &Manifest) -> Result<Result<(), Error>, Error> {
        let layer = WritableLayer::open(paths, &self.options)?;
        // Slow steps come before the rename, for which writes wait.
        self.volume.flush()?;
        let new = NewManifest::write(&manifest_path(&self.first), manifest)?;
        let volume = &self.volume;
        volume.freeze(layer, || new.put_in_place(), || new.sync())
    }

    /// Makes the disk `size` bytes large, durably, before any reader or writer sees the new size. Snapshots keep their
    /// size. A disk of this size stays as it is.
    ///
    /// # Errors
    /// [`Error::ReadOnly`], [`Error::Shrinks`], [`Error::Size`]; those of the storage, after which the disk has its old
    /// size, and the next start finds the old or the new one.
    pub fn grow_disk(&self, size: u64) -> Result<(), Error> {
        // No snapshot may put a layer of the old size above meanwhile.
        let _manifest = self.manifest.lock();
        self.volume.grow(size)
    }

    /// Seals the frozen layers, oldest first: a sealed layer needs sealed layers below it. Waits for a running seal.
    ///
    /// # Errors
    /// [`Error::ManifestMayRevert`]; those of [`WritableLayer::seal`] for the first layer that fails.
    pub fn seal(&self) -> Result<(), Error> {
        let _sealing = self.sealing.lock();
        let sealed = self.seal_frozen();
        self.seal_failed.store(sealed.is_err(), Ordering::Release);
        sealed
    }

    fn seal_frozen(&self) -> Result<(), Error> {
        let layers = {
            // Waits until the manifest that names the frozen layers is durable.
            let _manifest = self.manifest.lock();
            self.volume.layers()
        };
        if self.manifest_may_revert.load(Ordering::Acquire) {
            return Err(Error::ManifestMayRevert {
                path: manifest_path(&self.first),
            });
        }
        let frozen: Vec<_> = layers.into_iter().skip(1).rev().collect();
        let mut sealed = Ok(());
        let count = frozen.iter().take_while(|layer| {
            sealed = layer.seal();
            sealed.is_ok()
        });
        let folded = self.volume.fold(&frozen[..count.count()]);
        sealed.and(folded)
    }

    /// Fails if this disk, or another one above its layers, could not be opened with one more layer.
    fn check_room(&self) -> Result<(), Error> {
        let image = self.volume.image().layers();
        let mappings = image.iter().map(|layer| layer.trailer().index_entries);
        let mappings = mappings.sum::<u64>() + self.volume.mappings();
        // The active layer becomes a frozen one.
        let layers = image.len() + self.volume.frozen() + 1;
        if layers > MAX_LAYERS || mappings > MAX_MAPPINGS {
            return Err(Error::TooTall);
        }
        match layers > self.max_layers {
            true => Err(Error::TooManyFiles(self.max_layers)),
            false => Ok(()),
        }
    }

    /// Returns whether the layers that are not sealed have reached their limit of number or memory.
    fn much_is_unsealed(&self) -> bool {
        let layers = self.volume.layers();
        let mappings: u64 = layers.iter().map(|layer| layer.mappings()).sum();
        layers.len() > 1 && (layers.len() >= MAX_UNSEALED || mappings > MAX_ENTRIES)
    }
}
