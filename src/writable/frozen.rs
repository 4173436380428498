//! Layers that snapshots froze, until they are folded.

use std::sync::Arc;

use super::manifest::FrozenPair;
use super::{Error, WritableLayer};

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
