//! The files of a stack, open: what loading an image needs of the system.
//!
//! Opening looks at paths and at nothing that a layer holds; loading reads what the layers hold, and
//! needs no path. A process enters its sandbox in between, so that hostile layers are parsed where
//! they can do no harm.
#![cfg_attr(
    not(test),
    warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)
)]

use std::sync::Arc;

use super::config::Stack;
use super::error::Error;
use super::lineage::Lineage;
use super::parallel::Workers;
use super::segment::MAX_LAYERS;
use crate::source::recorder::Recorder;
use crate::source::{self, Blob, LayerRef};

/// The files of a stack, open and not yet read.
#[derive(Clone, Debug)]
pub struct OpenStack {
    pub(super) blobs: Vec<Arc<Blob>>,
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
                blobs: blobs.into_iter().map(Arc::new).collect(),
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
        let blobs = layers.iter().map(|layer| layer.open().map(Arc::new));
        Ok(OpenStack {
            blobs: blobs.collect::<Result<_, _>>()?,
            workers: Workers::available(),
            lineage: self.lineage(),
        })
    }
}

impl OpenStack {
    /// The same layers, with `lineage` for those that do not lie upon their parents.
    pub fn with_lineage(self, lineage: Lineage) -> Self {
        Self { lineage, ..self }
    }

    /// The same layers, whose reads `recorder` notes; but for those that another stack has open too.
    pub fn recorded(self, recorder: &Arc<Recorder>) -> Self {
        let blobs = self.blobs.into_iter().enumerate();
        let blobs = blobs.map(|(number, blob)| match Arc::try_unwrap(blob) {
            Ok(blob) => Arc::new(blob.recorded(recorder, number)),
            Err(shared) => shared,
        });
        Self {
            blobs: blobs.collect(),
            ..self
        }
    }

    /// No layers, as below a writable layer that is the first of its image.
    pub fn empty(lineage: Lineage) -> Self {
        Self {
            blobs: Vec::new(),
            workers: Workers::available(),
            lineage,
        }
    }

    /// Whether there is no layer.
    pub fn is_empty(&self) -> bool {
        self.blobs.is_empty()
    }

    /// The same layers below `above`, whose files are opened.
    ///
    /// # Errors
    /// [`Error::TooManyLayers`] for a stack that no image can have, [`Error::Source`] if a file cannot
    /// be opened.
    pub fn below(self, above: &[LayerRef]) -> Result<Self, Error> {
        let blobs = above.iter().map(|layer| layer.open().map(Arc::new));
        self.below_open(blobs.collect::<Result<_, _>>()?)
    }

    /// The same layers below those that are stored in `above`.
    ///
    /// # Errors
    /// [`Error::TooManyLayers`] for a stack that no image can have.
    pub fn below_open(mut self, above: Vec<Arc<Blob>>) -> Result<Self, Error> {
        self.blobs.extend(above);
        match self.blobs.len() {
            len if len > MAX_LAYERS => Err(Error::TooManyLayers(len)),
            _ => Ok(self),
        }
    }
}
