//! The layers above an image at one moment, with the snapshots that froze them.
//!
//! This list is the list of snapshots of a disk in use. The manifest is its written form, from which the next start
//! makes the same list.

use std::iter;
use std::sync::Arc;

use super::manifest::{FrozenPair, Manifest, UnusedPairs};
use super::sealed::SealedLayers;
use super::{Error, WritableLayer};
use crate::units::Sector;

/// A layer that a snapshot froze: its content never changes again.
#[derive(Clone, Debug)]
pub(super) struct FrozenLayer {
    pair: FrozenPair,
    layer: Arc<WritableLayer>,
}

impl FrozenLayer {
    /// Returns the layer that a snapshot of an earlier run froze.
    ///
    /// # Errors
    /// [`Error::Frozen`] if it is frozen already.
    pub fn reopened(pair: FrozenPair, layer: WritableLayer) -> Result<Self, Error> {
        layer.freeze(|| Ok(()))?;
        Ok(Self {
            pair,
            layer: layer.into(),
        })
    }

    /// Freezes `layer`, the pair of files `pair`. Changes wait while `commit` puts another layer above it.
    ///
    /// # Errors
    /// [`Error::Frozen`] if it is frozen already; those of `commit`, after which the layer is unchanged.
    pub fn freeze(
        pair: FrozenPair,
        layer: &Arc<WritableLayer>,
        commit: impl FnOnce(&Self) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let frozen = Self {
            pair,
            layer: layer.clone(),
        };
        layer.freeze(|| commit(&frozen))
    }

    /// Returns the files, and the name of the snapshot.
    pub fn pair(&self) -> &FrozenPair {
        &self.pair
    }

    /// Returns the layer.
    pub fn layer(&self) -> &Arc<WritableLayer> {
        &self.layer
    }

    /// Seals the layer, and unlocks its file, so that other processes can open it.
    ///
    /// # Errors
    /// As [`WritableLayer::seal`].
    pub fn seal(&self) -> Result<SealedLayer, Error> {
        self.layer.seal_in_use()?;
        Ok(SealedLayer(self.clone()))
    }
}

/// A frozen layer that is sealed.
#[derive(Debug)]
pub(super) struct SealedLayer(FrozenLayer);

impl SealedLayer {
    /// Returns the files, and the name of the snapshot.
    pub fn pair(&self) -> &FrozenPair {
        &self.0.pair
    }

    /// Returns the layer.
    pub fn layer(&self) -> &WritableLayer {
        &self.0.layer
    }
}

/// The layer that takes the writes.
#[derive(Clone, Debug)]
pub(super) struct ActiveLayer {
    /// Number of its pair of files.
    pub number: u64,
    /// The layer.
    pub layer: Arc<WritableLayer>,
}

/// The layers above the image at one moment.
#[derive(Clone, Debug)]
pub(super) struct Above {
    active: ActiveLayer,
    /// Oldest first; all are newer than `sealed`.
    frozen: Vec<FrozenLayer>,
    /// Layers sealed since the start.
    sealed: Option<Arc<SealedLayers>>,
    /// The pairs that were sealed before the start, oldest first: the topmost layers of the image.
    in_image: Arc<[FrozenPair]>,
}

impl Above {
    /// The layers of a disk that is opened. Pairs and layers are oldest first.
    pub fn new(in_image: Vec<FrozenPair>, frozen: Vec<FrozenLayer>, active: ActiveLayer) -> Self {
        Self {
            active,
            frozen,
            sealed: None,
            in_image: in_image.into(),
        }
    }

    /// Returns the layers after a snapshot that froze the active one.
    pub fn with_snapshot(&self, frozen: &FrozenLayer, active: &ActiveLayer) -> Self {
        Self {
            active: active.clone(),
            frozen: self.frozen.iter().chain([frozen]).cloned().collect(),
            sealed: self.sealed.clone(),
            in_image: self.in_image.clone(),
        }
    }

    /// Folds `layers`, the oldest frozen ones, for a disk that ends at `disk_end`.
    ///
    /// # Errors
    /// Those of [`SealedLayers::above`].
    pub fn fold(&self, layers: &[SealedLayer], disk_end: Sector) -> Result<SealedLayers, Error> {
        SealedLayers::above(self.sealed.as_deref(), layers, disk_end)
    }

    /// Returns the layers with `sealed`, into which the `count` oldest frozen ones are folded.
    pub fn with_folded(&self, sealed: &Arc<SealedLayers>, count: usize) -> Self {
        Self {
            active: self.active.clone(),
            frozen: self.frozen.iter().skip(count).cloned().collect(),
            sealed: Some(sealed.clone()),
            in_image: self.in_image.clone(),
        }
    }

    /// Returns the layer that takes the writes.
    pub fn active(&self) -> &Arc<WritableLayer> {
        &self.active.layer
    }

    /// Returns the frozen layers that are not folded, oldest first.
    pub fn frozen(&self) -> &[FrozenLayer] {
        &self.frozen
    }

    /// Returns the folded layers.
    pub fn sealed(&self) -> Option<&SealedLayers> {
        self.sealed.as_deref()
    }

    /// Returns the layers that are not folded, topmost first.
    pub fn layers(&self) -> impl Iterator<Item = &Arc<WritableLayer>> {
        let frozen = self.frozen.iter().rev().map(FrozenLayer::layer);
        iter::once(self.active()).chain(frozen)
    }

    /// Returns the number of layers between the image and the active one.
    pub fn layers_below_active(&self) -> usize {
        let sealed = self.sealed.as_ref().map_or(0, |sealed| sealed.len());
        sealed + self.frozen.len()
    }

    /// Returns the number of mappings of all layers.
    pub fn mappings(&self) -> u64 {
        let layers: u64 = self.layers().map(|layer| layer.mappings()).sum();
        layers + self.sealed.as_ref().map_or(0, |sealed| sealed.mappings())
    }

    /// Returns the frozen pairs that are not part of the image, oldest first, and whether each is sealed.
    fn beside_image(&self) -> impl Iterator<Item = (&FrozenPair, bool)> {
        let folded = self.sealed.iter().flat_map(|sealed| sealed.pairs());
        let frozen = self.frozen.iter();
        folded
            .map(|pair| (pair, true))
            .chain(frozen.map(|frozen| (frozen.pair(), frozen.layer().is_sealed())))
    }

    /// Returns the frozen pairs that are not part of the image, oldest first.
    pub fn pairs_beside_image(&self) -> impl Iterator<Item = &FrozenPair> {
        self.beside_image().map(|(pair, _)| pair)
    }

    /// Returns all frozen pairs, oldest first, and whether each is sealed: the snapshots of the disk.
    pub fn pairs(&self) -> impl Iterator<Item = (&FrozenPair, bool)> {
        let in_image = self.in_image.iter().map(|pair| (pair, true));
        in_image.chain(self.beside_image())
    }

    /// Returns the written form of this list, for a disk beside which there are the pairs `unused`.
    pub fn manifest(&self, unused: &UnusedPairs) -> Manifest {
        let frozen = self.pairs().map(|(pair, _)| pair.clone());
        Manifest::new(frozen.collect(), self.active.number, unused.clone())
    }
}
