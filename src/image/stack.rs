//! The files of a stack, open: what loading an image needs of the system.
//!
//! Opening looks at paths and at nothing that a layer holds; loading reads what the layers hold, and
//! needs no path. A process enters its sandbox in between, so that hostile layers are parsed where
//! they can do no harm.

use super::config::Stack;
use super::error::Error;
use super::lineage::Lineage;
use super::parallel::Workers;
use super::segment::MAX_LAYERS;
use crate::source::{self, Blob, LayerRef};

/// The files of a stack, open and not yet read.
#[derive(Debug)]
pub struct OpenStack {
    pub(super) blobs: Vec<Blob>,
    pub(super) workers: Workers,
    pub(super) lineage: Lineage,
}

impl OpenStack {
    /// The layers that are stored in `blobs`, bottom first.
    ///
    /// # Errors
    /// [`Error::NoLayers`] and [`Error::TooManyLayers`] for a stack that no image can have.
    pub fn of(blobs: Vec<Blob>) -> Result<Self, Error> {
        match blobs.len() {
            0 => Err(Error::NoLayers),
            len if len > MAX_LAYERS => Err(Error::TooManyLayers(len)),
            _ => Ok(Self {
                blobs,
                workers: Workers::available(),
                lineage: Lineage::default(),
            }),
        }
    }
}

impl Stack {
    /// Opens the files of all layers.
    ///
    /// # Errors
    /// [`Error::NoLayers`] and [`Error::TooManyLayers`] for a stack that no image can have,
    /// [`Error::Source`] if a file cannot be opened.
    pub fn open_files(&self) -> Result<OpenStack, Error> {
        let layers = self.layers();
        match layers.len() {
            0 => return Err(Error::NoLayers),
            len if len > MAX_LAYERS => return Err(Error::TooManyLayers(len)),
            len => _ = source::make_room(len),
        }
        let blobs = layers.iter().map(LayerRef::open);
        Ok(OpenStack {
            blobs: blobs.collect::<Result<_, _>>()?,
            workers: Workers::available(),
            lineage: self.lineage(),
        })
    }
}
