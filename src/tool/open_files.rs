//! The files of a disk, open and not yet read: what the tool needs of the system before it enters its
//! sandbox.
//!
//! The layers are opened before. The files of a writable layer are opened inside, in its directories
//! only, because a list that snapshots keep there names them.

use std::path::PathBuf;
use std::sync::Arc;

use super::Error;
use super::disk::Files;
use crate::image::{self, Lineage, MAX_LAYERS, OpenStack};
use crate::source::{self, Blob, LayerRef};
use crate::writable::manifest::Pairs;
use crate::writable::{Paths, journal};

/// A layer, and its bytes if they could be opened.
pub type OpenLayer = (LayerRef, Result<Arc<Blob>, source::Error>);

/// The files of a disk, open and not yet read.
#[derive(Debug)]
pub struct OpenFiles {
    layers: Vec<OpenLayer>,
    lineage: Lineage,
    /// A stack without layers, made before the sandbox, which hides the number of processors.
    bottom: OpenStack,
    upper: Option<Paths>,
}

impl Files {
    /// Opens the layers. A layer that cannot be opened fails [`OpenFiles::stack`], and is a finding of
    /// a check.
    ///
    /// # Errors
    /// [`image::Error::TooManyLayers`] for a stack that no image can have.
    pub fn open(&self) -> Result<OpenFiles, Error> {
        let layers = self.stack.layers();
        if layers.len() > MAX_LAYERS {
            return Err(image::Error::TooManyLayers(layers.len()).into());
        }
        // Read once, while it can be.
        let _ = journal::boot_id();
        source::make_room(layers.len());
        Ok(OpenFiles {
            layers: layers.iter().map(open).collect(),
            lineage: self.stack.lineage(),
            bottom: OpenStack::empty(self.stack.lineage()),
            upper: self.upper.clone(),
        })
    }
}

fn open(layer: &LayerRef) -> OpenLayer {
    (layer.clone(), layer.open().map(Arc::new))
}

impl OpenFiles {
    /// The layers, bottom first.
    pub fn layers(&self) -> &[OpenLayer] {
        &self.layers
    }

    /// What to do about layers in a wrong order.
    pub fn lineage(&self) -> Lineage {
        self.lineage
    }

    /// Directories and files in which the writable layer is opened for reading.
    pub fn readable(&self) -> Vec<PathBuf> {
        let upper = self.upper.iter();
        let paths = upper.flat_map(|upper| upper.directories().into_iter().chain(upper.links()));
        paths.collect()
    }

    /// The files of the writable layer as snapshots have left them.
    ///
    /// # Errors
    /// The list of the snapshots cannot be read.
    pub fn pairs(&self) -> Result<Option<Pairs>, Error> {
        let upper = self.upper.as_ref();
        Ok(upper.map(Pairs::follow).transpose()?)
    }

    /// Opens the layers that snapshots have frozen, which lie above the others.
    pub fn add_frozen(&mut self, frozen: &[Paths]) {
        let frozen = frozen.iter().map(|pair| LayerRef::from(&pair.data));
        self.layers.extend(frozen.map(|layer| open(&layer)));
    }

    /// The stack of all layers.
    ///
    /// # Errors
    /// A layer could not be opened, or there are too many.
    pub fn stack(self, lineage: Lineage) -> Result<OpenStack, image::Error> {
        let blobs = self.layers.into_iter().map(|(_, blob)| blob);
        let stack = self.bottom.with_lineage(lineage);
        stack.below_open(blobs.collect::<Result<_, _>>()?)
    }
}
