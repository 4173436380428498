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

pub(super) mod open;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use uuid::Uuid;

use super::above::{Above, ActiveLayer};
use super::locks::{RankedMutex, Sealing};
use super::manifest::{FrozenPair, Manifest, ManifestFile};
use super::remove::remove_layer;
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
    /// When it was taken, in seconds since 1970. `None`: version 0.1 took it.
    pub taken: Option<u64>,
    /// Whether the layer is sealed. A process that opens it waits until it is.
    pub sealed: bool,
}

/// The snapshots of a disk. The list of them is that of the layers in the [`Volume`].
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
    /// Locked while a snapshot is taken, until it is durable.
    manifest: RankedMutex<ManifestFile>,
    /// Locked while layers are sealed.
    sealing: RankedMutex<Sealing>,
    /// Whether to seal before the next snapshot: an attempt to seal failed, or a snapshot that may not be durable.
    seal_first: AtomicBool,
}

impl Snapshots {
    /// Returns the snapshots, oldest first.
    pub fn list(&self) -> Vec<Snapshot> {
        let _manifest = self.manifest.lock();
        self.snapshots()
    }

    /// The snapshots, oldest first.
    fn snapshots(&self) -> Vec<Snapshot> {
        let above = self.volume.above();
        above.map_or_else(|_| Vec::new(), |above| self.snapshots_of(&above))
    }

    /// The snapshots that froze layers of `above`, oldest first.
    fn snapshots_of(&self, above: &Above) -> Vec<Snapshot> {
        let mut layers = self.lower.clone();
        let snapshots = above.pairs().map(|(pair, sealed)| {
            let snapshot = self.describe(pair, &layers, sealed);
            layers.clone_from(&snapshot.layers);
            snapshot
        });
        snapshots.collect()
    }

    /// The snapshot that froze `pair`, which is above the layers `below`.
    fn describe(&self, pair: &FrozenPair, below: &[LayerRef], sealed: bool) -> Snapshot {
        let layer = LayerRef::from(pair.paths(&self.first).data);
        Snapshot {
            name: pair.name().to_owned(),
            uuid: pair.uuid(),
            layers: below.iter().cloned().chain([layer]).collect(),
            taken: pair.taken(),
            sealed,
        }
    }

    /// The snapshot of this name.
    fn find(&self, name: &str) -> Option<Snapshot> {
        let mut snapshots = self.snapshots().into_iter();
        snapshots.find(|snapshot| snapshot.name == name)
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
        let is_known = {
            let _manifest = self.manifest.lock();
            self.find(name).is_some()
        };
        if !is_known && (self.seal_first.load(Ordering::Acquire) || self.much_is_unsealed()) {
            self.seal()?;
        }
        let mut manifest = self.manifest.lock();
        match self.find(name) {
            Some(snapshot) => Ok(snapshot),
            None => self.take_new(&mut manifest, name),
        }
    }

    /// Takes a snapshot of a new name.
    fn take_new(&self, file: &mut ManifestFile, name: &str) -> Result<Snapshot, Error> {
        let above = self.volume.above()?;
        let active = above.active();
        self.check_room(&above)?;
        // The snapshot's layer and the record of the one above it must name the same size.
        active.restore_size()?;
        let (now, paths) = file.reserve(above.manifest(file.unused()))?;
        let next = now.after_snapshot(name, active.header().uuid, &self.first);
        let (next, pair) = next.ok_or(Error::TooTall)?;
        let below = self.snapshots_of(&above).pop();
        let below = below.map_or_else(|| self.lower.clone(), |below| below.layers);
        let snapshot = self.describe(&pair, &below, false);
        let durable = self.freeze(file, &above, &next, &paths, pair)?;
        // Writes may have arrived since the flush before the freeze.
        let flushed = durable.and_then(|()| active.flush());
        flushed.inspect_err(|_| self.seal_first.store(true, Ordering::Release))?;
        Ok(snapshot)
    }

    /// Creates `paths`, the active pair of `manifest`, and puts it above the active layer, which it freezes as `pair`. The
    /// inner error is that of a manifest that may not be durable.
    fn freeze(
        &self,
        file: &mut ManifestFile,
        above: &Above,
        manifest: &Manifest,
        paths: &Paths,
        pair: FrozenPair,
    ) -> Result<Result<(), Error>, Error> {
        let below = above.active().header();
        let record = self.made_upon(above, &pair, below.virtual_size)?;
        let header = Header {
            uuid: Uuid::new_v4(),
            parent_uuid: below.uuid,
            message: record
                .and_then(|record| record.message(b""))
                .unwrap_or_default(),
            ..(*below).clone()
        };
        create(paths, above.active().kind(), &header)?;
        self.put_above(file, paths, manifest, pair)
            .inspect_err(|_| {
                // If this fails, the next snapshot or the next start does it.
                let _ = remove_layer(paths);
            })
    }

    /// The record of a layer above `above`, whose active layer becomes `pair`; together they make up a disk of `size`
    /// bytes. `None`: a writable layer has no uuid, and samples of its data are not final before it is sealed.
    fn made_upon(
        &self,
        above: &Above,
        pair: &FrozenPair,
        size: u64,
    ) -> Result<Option<MadeUpon>, Error> {
        let pairs = above.pairs_beside_image().chain([pair]);
        let ids: Option<Vec<_>> = pairs.map(|pair| LayerId::named(pair.uuid())).collect();
        let Some(ids) = ids else { return Ok(None) };
        let image = self.volume.image().stack_id()?;
        let stack = ids.into_iter().fold(image, StackId::below);
        Ok(Some(MadeUpon { stack, size }))
    }

    fn put_above(
        &self,
        file: &mut ManifestFile,
        paths: &Paths,
        manifest: &Manifest,
        pair: FrozenPair,
    ) -> Result<Result<(), Error>, Error> {
        let next = ActiveLayer {
            number: manifest.active(),
            layer: WritableLayer::open(paths, None, &self.options)?.into(),
        };
        // Slow steps come before the rename, for which writes wait.
        self.volume.flush()?;
        let new = file.prepare(manifest)?;
        self.volume.freeze(file, pair, &next, &new)
    }

    /// Makes the disk `size` bytes large, durably, before any reader or writer sees the new size. Snapshots keep their
    /// size. A disk of this size stays as it is.
    ///
    /// # Errors
    /// [`Error::ReadOnly`], [`Error::Shrinks`], [`Error::Size`]; those of the storage, after which the disk has its old
    /// size, and the next start finds the old or the new one.
    pub fn grow_disk(&self, size: u64) -> Result<(), Error> {
        self.volume.grow(&mut self.manifest.lock(), size)
    }

    /// Seals the frozen layers, oldest first: a sealed layer needs sealed layers below it. Waits for a running seal.
    ///
    /// # Errors
    /// [`Error::ManifestMayRevert`]; those of [`WritableLayer::seal`] for the first layer that fails.
    pub fn seal(&self) -> Result<(), Error> {
        let mut sealing = self.sealing.lock();
        let sealed = self.seal_frozen(&mut sealing);
        self.seal_first.store(sealed.is_err(), Ordering::Release);
        sealed
    }

    fn seal_frozen(&self, sealing: &mut Sealing) -> Result<(), Error> {
        let now = {
            // Waits until the manifest that names the frozen layers is durable.
            let manifest = self.manifest.lock();
            manifest.check_durable()?;
            self.volume.above()?
        };
        self.volume.seal(sealing, now)
    }

    /// Fails if this disk, or another one above its layers, could not be opened with one more layer.
    fn check_room(&self, above: &Above) -> Result<(), Error> {
        let image = self.volume.image().layers();
        let mappings = image.iter().map(|layer| layer.trailer().index_entries);
        let mappings = mappings.sum::<u64>() + above.mappings();
        // The active layer becomes a frozen one.
        let layers = image.len() + above.layers_below_active() + 1;
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
