//! The layers of a disk between start and sandbox: opened or attached to a fetcher, and not parsed yet.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::config::WritableSource;
use super::remote::Remote;
use super::{Config, Error};
use crate::fetch::open::{AttachedLayers, LocalLayers, Needs, OpenLayers};
use crate::fetch::process::Process;
use crate::fetch::resolve::resolve;
use crate::format::download::Download;
use crate::format::tables::LayerIdentity;
use crate::image::config::Stack;
use crate::image::tables::TablesFile;
use crate::image::{self, Image, MAX_LAYERS, OpenStack};
use crate::io::confine;
use crate::registry::reference::Reference;
use crate::source::client::Client;
use crate::source::{self, Blob, LayerRef, RemoteBlob};
use crate::writable::Paths;

/// The layers of a disk, not yet parsed, and the location of its writable layer.
#[derive(Debug)]
pub struct Sources {
    stack: Stack,
    files: Files,
    upper: Option<WritableSource>,
    /// The layer in a registry that holds the image's trace.
    trace: Option<Arc<RemoteBlob>>,
    /// The fetcher that resolved the image.
    fetcher: Option<Box<Process>>,
    /// The cache directory.
    cache: Option<PathBuf>,
    /// What is known of the layers.
    tables: Option<Arc<TablesFile>>,
}

/// The bytes of the layers.
#[derive(Debug)]
enum Files {
    /// All are open.
    Open(OpenStack),
    /// Some are in registries.
    Local(LocalLayers),
    /// Some are in registries, and registered with a fetcher.
    Attached(AttachedLayers),
}

/// The layers of a disk, open and not yet parsed.
pub(super) struct OpenSources {
    pub(super) stack: Stack,
    pub(super) files: OpenStack,
    /// Client of the fetcher, for layers in registries.
    pub(super) client: Option<Arc<Client>>,
    /// The layer in a registry that holds the image's trace.
    pub(super) trace: Option<Blob>,
}

impl Sources {
    /// Opens the layers of `stack`. The writable layer above them is the one that the command line or
    /// the image config (`configured`) names.
    ///
    /// # Errors
    ///
    /// [`Error::TwoUppers`] and [`Error::NothingToLimit`] for options that contradict each other,
    /// [`Error::Image`] if a layer cannot be opened.
    pub fn open(config: &Config, stack: &Stack, configured: Option<Paths>) -> Result<Self, Error> {
        let upper = match (&config.upper, configured) {
            (Some(_), Some(_)) => return Err(Error::TwoUppers),
            (None, None) if config.upper_limit.is_some() => return Err(Error::NothingToLimit),
            (None, Some(paths)) => Some(WritableSource::Files(paths)),
            (named, None) => named.clone(),
        };
        let stack = stack.clone().with_lineage(config.lineage);
        let is_remote = |layer: &LayerRef| layer.file().is_none();
        let files = match (stack.layers(), &upper) {
            ([], Some(_)) => Files::Open(OpenStack::empty(config.lineage)),
            (layers, _) if layers.len() > MAX_LAYERS => {
                return Err(Error::Image(image::Error::TooManyLayers(layers.len())));
            }
            (layers, _) if layers.iter().any(is_remote) => {
                Files::Local(LocalLayers::open(layers).map_err(Error::Layers)?)
            }
            _ => Files::Open(stack.open_files().map_err(Error::Image)?),
        };
        // Inside the sandbox the current directory cannot be read.
        let absolute = stack.layers().iter().map(|layer| {
            layer.absolute().map_err(|source| {
                let layer = layer.clone();
                Error::Image(source::Error::Open { layer, source }.into())
            })
        });
        let absolute: Vec<LayerRef> = absolute.collect::<Result<_, Error>>()?;
        Ok(Self {
            stack: Stack::new(absolute).with_lineage(config.lineage),
            files,
            upper,
            trace: None,
            fetcher: None,
            cache: config.remote.cache.clone(),
            tables: None,
        })
    }

    /// Returns the location of the writable layer, if the disk has one.
    pub fn upper(&self) -> Option<&WritableSource> {
        self.upper.as_ref()
    }

    /// The cache directory, if one is named.
    pub(super) fn cache(&self) -> Option<&Path> {
        self.cache.as_deref()
    }

    /// The identities of the layers, bottom first; `None` if one of them has none.
    ///
    /// # Errors
    ///
    /// [`source::Error::Open`] if a file cannot be examined.
    pub(super) fn identities(&self) -> Result<Option<Vec<LayerIdentity>>, source::Error> {
        match &self.files {
            Files::Open(files) => files.identities(),
            Files::Local(_) => Ok(None),
            Files::Attached(layers) => layers.identities(),
        }
    }

    /// Sets what is known of the layers, so that they need not be read.
    pub(super) fn with_tables(self, tables: Option<Arc<TablesFile>>) -> Self {
        Self { tables, ..self }
    }

    /// Starts a fetcher, and has it find the layers of an image in a registry.
    ///
    /// # Errors
    ///
    /// Those of [`Remote::new`], [`Remote::start`] and [`Sources::open`]; [`Error::Resolve`].
    pub fn resolve(config: &Config, reference: &Reference) -> Result<Self, Error> {
        let fetcher = Remote::new(config, || reference.to_string())?.start()?;
        let patience = config.remote.patience().start;
        let image = resolve(&fetcher, reference, patience).map_err(Error::Resolve)?;
        log::info!("{reference} names the manifest {}", image.manifest);
        let stack = Stack::new(image.layers.into_iter().map(LayerRef::Remote));
        Ok(Self {
            trace: image.trace,
            fetcher: Some(Box::new(fetcher)),
            ..Self::open(config, &stack, None)?
        })
    }

    /// Starts a fetcher if some layers are in registries and none was started before. `download` is the image config's setting of the background download.
    ///
    /// # Errors
    ///
    /// Those of [`Remote::new`], [`Remote::start`] and [`Remote::attach`].
    pub fn connect(self, config: &Config, download: Option<&Download>) -> Result<Self, Error> {
        let Files::Local(layers) = self.files else {
            return Ok(self);
        };
        let wanted = || {
            let mut layers = self.stack.layers().iter();
            let remote = layers.find(|layer| layer.file().is_none());
            remote.map(LayerRef::to_string).unwrap_or_default()
        };
        let remote = Remote::new(config, wanted)?;
        let fetcher = self
            .fetcher
            .map_or_else(|| remote.start(), |fetcher| Ok(*fetcher))?;
        let layers = remote.attach(fetcher, layers, self.trace.clone(), download)?;
        let files = Files::Attached(layers);
        let cache = Some(remote.cache().to_owned());
        Ok(Self {
            files,
            cache,
            fetcher: None,
            ..self
        })
    }

    /// Opens the layers that are in registries.
    pub(super) fn open_remotes(self, config: &Config) -> Result<OpenSources, Error> {
        let Self {
            stack,
            files,
            tables,
            ..
        } = self;
        let needs = match tables {
            _ if config.remote.verify_first => Needs::Whole,
            Some(_) => Needs::Nothing,
            None => Needs::Structures,
        };
        let (files, client, trace) = match files {
            Files::Open(files) => (files, None, None),
            Files::Local(_) => {
                let wanted = "a layer".to_owned();
                return Err(Error::NoCache { wanted });
            }
            Files::Attached(layers) => {
                // The sandbox dropped the other capabilities of all threads that start in it.
                let drop_privileges = || {
                    if let Err(error) = confine::drop_rest() {
                        log::error!("cannot drop the privileges of a thread: {error}");
                    }
                };
                let opened = layers.open(config.remote.patience(), needs, drop_privileges);
                let OpenLayers {
                    blobs,
                    trace,
                    client,
                } = opened.map_err(Error::Layers)?;
                let files = OpenStack::of(blobs).map_err(Error::Image)?;
                (files.with_lineage(stack.lineage()), Some(client), trace)
            }
        };
        Ok(OpenSources {
            stack,
            files: files.with_tables(tables),
            client,
            trace,
        })
    }
}

impl OpenSources {
    /// Parses the layers, before the disk parses them again.
    pub(super) fn image(&self) -> Result<Image, image::Error> {
        Image::load(self.files.clone())
    }
}
