//! The layers above an image at one moment, with the snapshots that froze them.
//!
//! This list is the list of snapshots of a disk in use. The manifest is its written form, from which the next start
//! makes the same list.

use std::iter;
use std::sync::Arc;

use super::frozen::{FrozenLayer, SealedLayer};
use super::manifest::{FrozenPair, Manifest, UnusedPairs};
use super::sealed::SealedLayers;
use super::{Error, WritableLayer};
use crate::units::Sector;

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
