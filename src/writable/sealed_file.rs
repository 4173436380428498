//! The data file of a sealed layer.

use std::sync::Arc;

use super::manifest::FrozenPair;
use crate::source::Blob;

/// The data file of a sealed layer, and the snapshot that froze the layer.
#[derive(Clone, Debug)]
pub(super) struct SealedFile {
    pair: FrozenPair,
    blob: Arc<Blob>,
}

impl SealedFile {
    /// The data file `blob` of the layer that was the frozen pair `pair`.
    pub fn new(pair: FrozenPair, blob: Arc<Blob>) -> Self {
        Self { pair, blob }
    }

    /// Returns the frozen pair that the layer was.
    pub fn pair(&self) -> &FrozenPair {
        &self.pair
    }

    /// Returns the data file as readers use it.
    pub fn blob(&self) -> &Arc<Blob> {
        &self.blob
    }
}
