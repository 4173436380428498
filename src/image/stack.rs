//! Open files of a stack: all that loading an image needs of the system.
//!
//! Opening uses paths and reads no byte of a layer. Loading reads the layers and uses no path. A
//! process enters its sandbox in between, so that hostile layers are parsed inside it.
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
use super::tables::{self, TablesFile};
use crate::format::tables::LayerIdentity;
use crate::source::recorder::Recorder;
use crate::source::{self, Blob, LayerRef};

/// The open files of a stack. Nothing has been read from them.
#[derive(Clone, Debug)]
pub struct OpenStack {
    pub(super) blobs: Vec<Arc<Blob>>,
    pub(super) workers: Workers,
    pub(super) lineage: Lineage,
    /// What is known of the lowest layers, so that they need not be read.
    pub(super) tables: Option<Arc<TablesFile>>,
}

impl OpenStack {
    /// A stack of the layers in `blobs`, bottom first.
    ///
    /// # Errors
    /// [`Error::NoLayers`] without blobs, [`Error::TooManyLayers`] for more than [`MAX_LAYERS`].
    pub fn of(blobs: Vec<Blob>) -> Result<Self, Error> {
        match blobs.len() {
            0 => Err(Error::NoLayers),
            len if len > MAX_LAYERS => Err(Error::TooManyLayers(len)),
            _ => Ok(Self {
                blobs: blobs.into_iter().map(Arc::new).collect(),
                workers: Workers::available(),
                lineage: Lineage::default(),
                tables: None,
            }),
        }
    }
}

impl Stack {
    /// Opens the files of all layers.
    ///
    /// # Errors
    /// [`Error::NoLayers`] without layers, [`Error::TooManyLayers`] for more than [`MAX_LAYERS`],
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
            tables: None,
        })
    }
}

impl OpenStack {
    /// Sets the lineage rules of the stack.
    pub fn with_lineage(self, lineage: Lineage) -> Self {
        Self { lineage, ..self }
    }

    /// Sets the tables of these layers. If they are not those of the layers, the layers are read.
    pub fn with_tables(self, tables: Option<Arc<TablesFile>>) -> Self {
        Self { tables, ..self }
    }

    /// The identities of the layers, as [`tables::identities`] returns them.
    ///
    /// # Errors
    /// [`source::Error::Open`] if a file cannot be examined.
    pub fn identities(&self) -> Result<Option<Vec<LayerIdentity>>, source::Error> {
        tables::identities(self.blobs.iter().map(|blob| &**blob))
    }

    /// Records the reads of all layers from now on, also those that load them.
    pub fn start_recording(&self, recorder: &Arc<Recorder>) {
        for (number, blob) in self.blobs.iter().enumerate() {
            blob.start_recording(recorder, number);
        }
    }

    /// A stack without layers, below a writable layer that is the first of its image.
    pub fn empty(lineage: Lineage) -> Self {
        Self {
            blobs: Vec::new(),
            workers: Workers::available(),
            lineage,
            tables: None,
        }
    }

    /// Whether there is no layer.
    pub fn is_empty(&self) -> bool {
        self.blobs.is_empty()
    }

    /// Opens the files of `above` and adds them above these layers.
    ///
    /// # Errors
    /// [`Error::TooManyLayers`] for more than [`MAX_LAYERS`], [`Error::Source`] if a file cannot be
    /// opened.
    pub fn below(self, above: &[LayerRef]) -> Result<Self, Error> {
        let blobs = above.iter().map(|layer| layer.open().map(Arc::new));
        self.below_open(blobs.collect::<Result<_, _>>()?)
    }

    /// Adds the layers in `above` above these.
    ///
    /// # Errors
    /// [`Error::TooManyLayers`] for more than [`MAX_LAYERS`].
    pub fn below_open(mut self, above: Vec<Arc<Blob>>) -> Result<Self, Error> {
        self.blobs.extend(above);
        match self.blobs.len() {
            len if len > MAX_LAYERS => Err(Error::TooManyLayers(len)),
            _ => Ok(self),
        }
    }
}
