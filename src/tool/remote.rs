//! Layers in registries, for commands that read layers: a fetcher brings the bytes that are read.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::Error;
use super::open_files::OpenFiles;
use super::sources::Sources;
use crate::fetch::open::{AttachedBlobs, OpenError};
use crate::fetch::process::{self, Config, Control, Process, ProcessError};
use crate::fetch::resolve::{ResolveError, resolve};
use crate::image::config::Stack;
use crate::registry::args::RegistryArgs;
use crate::registry::reference::Reference;
use crate::source::LayerRef;
use crate::source::client::Patience;

/// Longest wait for a registry to name the layers of an image, or for a layer to open.
const START: Duration = Duration::from_secs(60);

/// A cache, and how registries are reached.
#[derive(Debug)]
pub struct Registries {
    fetcher: Config,
    patience: Patience,
    /// The fetcher that resolved an image. It has a connection to the registry, and a token.
    started: Mutex<Option<Process>>,
}

impl Registries {
    /// Registries reached as `registry` says, with a cache in `cache`. A read waits for at most
    /// `deadline`.
    pub fn new(cache: PathBuf, registry: RegistryArgs, deadline: Duration) -> Self {
        Self {
            fetcher: Config {
                cache,
                registry,
                sandbox: true,
            },
            patience: Patience {
                start: START,
                serving: Some(deadline),
            },
            started: Mutex::default(),
        }
    }

    /// The layers of an image. The program calls [`process::run_if_asked`] at its start.
    ///
    /// # Errors
    /// [`Error::Resolve`].
    pub fn resolve(&self, reference: &Reference) -> Result<Stack, Error> {
        let process = self.start().map_err(ResolveError::Process)?;
        let image = resolve(&process, reference, self.patience.start)?;
        *self.started() = Some(process);
        Ok(Stack::new(image.layers.into_iter().map(LayerRef::Remote)))
    }

    /// Lets a fetcher serve the layers that are in registries: the one that resolved the image, or a new one.
    /// It ends when the returned control is dropped. Call it before the sandbox.
    ///
    /// # Errors
    /// [`Error::Layers`]: the cache or the options for registries cannot be used, or the system refuses
    /// a process.
    pub fn attach(&self, files: OpenFiles) -> Result<(Sources, Control), Error> {
        let layers = files.layers().iter().map(|layer| &layer.name);
        let blobs = layers.filter_map(|layer| match layer {
            LayerRef::File(_) => None,
            LayerRef::Remote(blob) => Some(Arc::clone(blob)),
        });
        let blobs = blobs.collect();
        let started = self.started().take();
        let process = started.map_or_else(|| self.start(), Ok);
        let process = process.map_err(OpenError::Process)?;
        let attached = AttachedBlobs::attach(&process, blobs, None).map_err(OpenError::Process)?;
        let sources = Sources::remote(files, attached, self.patience);
        Ok((sources, process.into_control()))
    }

    fn start(&self) -> Result<Process, ProcessError> {
        Process::start(Path::new(process::ITSELF), &self.fetcher)
    }

    fn started(&self) -> MutexGuard<'_, Option<Process>> {
        self.started.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
