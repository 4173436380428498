//! The open files of a disk, not yet read.
//!
//! Local layers are opened before the sandbox. The files of a writable layer are opened inside, in its
//! directories only, because the snapshot manifest there names them.

use std::path::PathBuf;
use std::sync::Arc;

use super::Error;
use crate::image::config::Stack;
use crate::image::{self, Image, Lineage, MAX_LAYERS, OpenStack};
use crate::source::client::Client;
use crate::source::{self, Blob, LayerRef};
use crate::writable::manifest::Pairs;
use crate::writable::{Paths, journal};

/// Names of the files of a stack: layers, a writable layer, or both.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StackFiles {
    /// The sealed layers; may be empty with a writable layer.
    pub stack: Stack,
    /// The writable layer. After snapshots: the pair of files that the disk started with.
    pub upper: Option<Paths>,
}

impl StackFiles {
    /// The same files, which may be the upper part of an image.
    #[must_use]
    pub fn as_part(&self) -> Self {
        let lineage = self.stack.lineage().of_part();
        Self {
            stack: self.stack.clone().with_lineage(lineage),
            upper: self.upper.clone(),
        }
    }
}

/// A layer that was opened.
#[derive(Debug)]
pub struct OpenLayer {
    /// Its path, or the URL of its blob.
    pub name: LayerRef,
    /// Its bytes, or why it cannot be opened.
    pub blob: Result<Arc<Blob>, source::Error>,
    /// Bytes that were local when it was opened.
    pub local_bytes: u64,
}

impl OpenLayer {
    fn open(name: LayerRef) -> Self {
        let blob = name.open().map(Arc::new);
        let local_bytes = blob.as_ref().map_or(0, |blob| blob.len());
        Self {
            name,
            blob,
            local_bytes,
        }
    }

    /// Whether the layer is in a registry.
    pub fn is_remote(&self) -> bool {
        self.name.file().is_none()
    }
}

/// The open files of a disk.
#[derive(Debug)]
pub struct OpenFiles {
    layers: Vec<OpenLayer>,
    lineage: Lineage,
    /// A stack without layers, made before the sandbox, which hides the number of processors.
    bottom: OpenStack,
    upper: Option<Paths>,
    /// The connection to the fetcher of layers in registries.
    client: Option<Arc<Client>>,
}

impl StackFiles {
    /// Opens the local layers. A layer that cannot be opened fails [`OpenFiles::load`], and is a finding
    /// of a check. A layer in a registry is such a layer until
    /// [`Registries::attach`](super::remote::Registries::attach).
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
            layers: layers.iter().cloned().map(OpenLayer::open).collect(),
            lineage: self.stack.lineage(),
            bottom: OpenStack::empty(self.stack.lineage()),
            upper: self.upper.clone(),
            client: None,
        })
    }
}

impl OpenFiles {
    /// The layers, bottom first.
    pub fn layers(&self) -> &[OpenLayer] {
        &self.layers
    }

    pub(super) fn layers_mut(&mut self) -> impl Iterator<Item = &mut OpenLayer> {
        self.layers.iter_mut()
    }

    /// Whether a layer is in a registry.
    pub fn is_remote(&self) -> bool {
        self.layers.iter().any(OpenLayer::is_remote)
    }

    /// For each layer, the bytes that were local when it was opened.
    pub fn local_bytes(&self) -> Vec<u64> {
        self.layers.iter().map(|layer| layer.local_bytes).collect()
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
    /// The snapshot manifest cannot be read.
    pub fn pairs(&self) -> Result<Option<Pairs>, Error> {
        let upper = self.upper.as_ref();
        Ok(upper.map(Pairs::read).transpose()?)
    }

    /// Opens the layers that snapshots have frozen, which lie above the others.
    pub fn add_frozen(&mut self, frozen: &[Paths]) {
        let frozen = frozen.iter().map(|pair| LayerRef::from(&pair.data));
        self.layers.extend(frozen.map(OpenLayer::open));
    }

    /// Sets the connection that brings the bytes of layers in registries.
    pub(super) fn read_through(&mut self, client: Arc<Client>) {
        self.client = Some(client);
    }

    /// Tells the fetcher that layers are read from now on, not only opened.
    pub fn start_reading(&self) {
        if let Some(client) = &self.client {
            client.start_reading();
        }
    }

    /// The stack of all layers.
    ///
    /// # Errors
    /// A layer could not be opened, or there are too many.
    pub fn stack(self, lineage: Lineage) -> Result<OpenStack, image::Error> {
        let blobs = self.layers.into_iter().map(|layer| layer.blob);
        let stack = self.bottom.with_lineage(lineage);
        stack.below_open(blobs.collect::<Result<_, _>>()?)
    }

    /// Loads the image of all layers.
    ///
    /// # Errors
    /// [`image::Error`]: there is no layer, or one cannot be opened or loaded.
    pub fn load(self) -> Result<Image, image::Error> {
        let (client, lineage) = (self.client.clone(), self.lineage);
        if self.layers.is_empty() {
            return Err(image::Error::NoLayers);
        }
        let image = Image::load(self.stack(lineage)?)?;
        if let Some(client) = client {
            client.start_reading();
        }
        Ok(image)
    }
}
