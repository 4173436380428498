//! Layers in registries, for commands that read layers: their blobs are pulled into the cache first.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use indicatif::ProgressBar;
use serde::Serialize;
use thiserror::Error;

use super::pull::{self, fill};
use crate::cache::{self, Cache};
use crate::fetch::process::{self, Config};
use crate::fetch::resolve::{ResolveError, resolve};
use crate::image::config::Stack;
use crate::registry::args::RegistryArgs;
use crate::registry::blob::BlobRef;
use crate::registry::client::Client;
use crate::registry::error::Error as RegistryError;
use crate::registry::reference::Reference;
use crate::registry::repository::{self, Repository};
use crate::registry::service_config;
use crate::source::{LayerRef, RemoteBlob};

/// How long a registry may take to name the layers of an image.
const PATIENCE: Duration = Duration::from_secs(60);

/// Layers in a registry cannot be had.
#[derive(Debug, Error)]
pub enum Error {
    /// The image cannot be found.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// The options for registries cannot be used.
    #[error(transparent)]
    Service(#[from] service_config::Error),
    /// Registries cannot be used as configured.
    #[error("cannot reach registries")]
    Registry(#[source] Box<RegistryError>),
    /// The URL of the blobs is malformed.
    #[error(transparent)]
    Url(#[from] repository::Error),
    /// The cache cannot be used.
    #[error(transparent)]
    Cache(Box<cache::Error>),
    /// A layer cannot be fetched.
    #[error(transparent)]
    Pull(#[from] pull::Error),
    /// A layer that was fetched is gone.
    #[error("{layer} was evicted from the cache again: make the cache larger")]
    Evicted {
        /// The blob.
        layer: LayerRef,
    },
}

/// A cache, and how registries are reached.
#[derive(Clone, Debug)]
pub struct Registries {
    fetcher: Config,
}

/// A layer, and how much of it is local.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LayerPart {
    /// A path, or the URL of a blob.
    pub layer: LayerRef,
    /// Bytes of the layer as stored, if they are known.
    pub bytes: Option<u64>,
    /// Bytes that are local.
    pub local_bytes: u64,
}

/// The layers of an image, some of them in a registry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Parts {
    /// The layers, bottom first.
    pub layers: Vec<LayerPart>,
}

/// Whether a layer of the stack is in a registry.
pub fn is_remote(stack: &Stack) -> bool {
    stack.layers().iter().any(|layer| layer.file().is_none())
}

impl Registries {
    /// Registries reached as `registry` says, with a cache in `cache`.
    pub fn new(cache: PathBuf, registry: RegistryArgs) -> Self {
        let fetcher = Config {
            cache,
            registry,
            sandbox: true,
        };
        Self { fetcher }
    }

    /// The layers of an image. The program calls [`process::run_if_asked`] at its start.
    ///
    /// # Errors
    /// [`Error::Resolve`].
    pub fn resolve(&self, reference: &Reference) -> Result<Stack, Error> {
        let program = Path::new(process::ITSELF);
        let image = resolve(program, &self.fetcher, reference, PATIENCE)?;
        Ok(Stack::new(image.layers.into_iter().map(LayerRef::Remote)))
    }

    /// The same stack of local files: blobs in registries are fetched whole and verified, unless the
    /// cache has them.
    ///
    /// # Errors
    /// An [`Error`]: a blob cannot be fetched or kept.
    pub fn pull(&self, stack: &Stack, bar: &ProgressBar) -> Result<Stack, Error> {
        let cache = self.cache()?;
        let missing = remotes(stack).filter(|blob| cache.complete_path(&blob.digest).is_none());
        let missing = missing.map(|blob| {
            Ok(BlobRef {
                repository: Repository::from_blob_url(&blob.blobs_url)?,
                digest: blob.digest,
                size: blob.size,
            })
        });
        let missing = missing.collect::<Result<Vec<_>, Error>>()?;
        if !missing.is_empty() {
            let (options, _) = self.fetcher.registry.clone().into_options()?;
            let client = Client::new(options).map_err(|error| Error::Registry(Box::new(error)))?;
            fill(&Arc::new(client), self.cache()?, missing, bar)?;
        }
        let layers = stack.layers().iter().map(|layer| match layer {
            LayerRef::File(_) => Ok(layer.clone()),
            LayerRef::Remote(blob) => {
                let path = cache.complete_path(&blob.digest);
                let layer = layer.clone();
                path.map(LayerRef::File).ok_or(Error::Evicted { layer })
            }
        });
        let layers = layers.collect::<Result<Vec<_>, _>>()?;
        Ok(Stack::new(layers).with_lineage(stack.lineage()))
    }

    /// What of each layer is local. Reads no layer.
    ///
    /// # Errors
    /// [`Error::Cache`].
    pub fn parts(&self, stack: &Stack) -> Result<Parts, Error> {
        let cached = self.cache()?.list();
        let cached = cached.map_err(|error| Error::Cache(Box::new(error)))?;
        let layers = stack.layers().iter().map(|layer| match layer {
            LayerRef::File(path) => {
                let len = path.metadata().map(|metadata| metadata.len()).ok();
                (layer, len, len.unwrap_or(0))
            }
            LayerRef::Remote(blob) => {
                let mut items = cached.iter().filter(|item| item.digest == blob.digest);
                let fits = |len| blob.size.is_none_or(|size| size == len);
                let item = items.find(|item| fits(item.len));
                let len = blob.size.or(item.map(|item| item.len));
                (layer, len, item.map_or(0, |item| item.present))
            }
        });
        let layers = layers.map(|(layer, bytes, local_bytes)| LayerPart {
            layer: layer.clone(),
            bytes,
            local_bytes,
        });
        Ok(Parts {
            layers: layers.collect(),
        })
    }

    fn cache(&self) -> Result<Cache, Error> {
        Cache::open(&self.fetcher.cache).map_err(|error| Error::Cache(Box::new(error)))
    }
}

fn remotes(stack: &Stack) -> impl Iterator<Item = &Arc<RemoteBlob>> {
    stack.layers().iter().filter_map(|layer| match layer {
        LayerRef::File(_) => None,
        LayerRef::Remote(blob) => Some(blob),
    })
}

impl fmt::Display for Parts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:>16} {:>16}  layer", "bytes", "local bytes")?;
        for part in &self.layers {
            let bytes = part
                .bytes
                .map_or("unknown".to_owned(), |bytes| bytes.to_string());
            writeln!(f, "{bytes:>16} {:>16}  {}", part.local_bytes, part.layer)?;
        }
        Ok(())
    }
}
