//! Layers in registries: which fetcher brings them, and how long a disk waits for them.

use std::path::Path;
use std::sync::Arc;

use super::{Config, Error};
use crate::fetch::Download;
use crate::fetch::open::{AttachedLayers, LocalLayers};
use crate::fetch::process::{self, Control, Process};
use crate::fetch::resolve::{self, ResolvedImage};
use crate::format::download;
use crate::registry::reference::Reference;
use crate::registry::service_config::ServiceConfig;
use crate::source::RemoteBlob;
use crate::source::client::Patience;

/// How layers in registries are reached.
#[derive(Debug)]
pub struct Remote {
    fetcher: process::Config,
    /// For images that say nothing about it.
    download: Option<download::Download>,
}

impl Remote {
    /// Reads the service configuration, if one is named.
    ///
    /// # Errors
    /// [`Error::ServiceConfig`] if it cannot be used, [`Error::NoCache`] if neither it nor the command
    /// line names a cache for `wanted`.
    pub fn new(config: &Config, wanted: impl FnOnce() -> String) -> Result<Self, Error> {
        let sandbox = config.sandbox;
        let config = &config.remote;
        let service = config.registry.service_config.as_deref();
        let service = service.map(ServiceConfig::load).transpose();
        let service = service.map_err(Error::ServiceConfig)?.unwrap_or_default();
        let configured = || service.our_cache();
        let cache = match config.cache.clone().or_else(configured) {
            Some(cache) => cache,
            None => return Err(Error::NoCache { wanted: wanted() }),
        };
        let cache = std::path::absolute(&cache).map_err(|source| Error::CachePath {
            path: cache.clone(),
            source,
        })?;
        let registry = config.registry.clone();
        Ok(Self {
            fetcher: process::Config {
                cache,
                registry,
                sandbox,
            },
            download: service.download,
        })
    }

    /// Finds the layers of an image.
    ///
    /// # Errors
    /// [`Error::Resolve`].
    pub fn resolve(
        &self,
        reference: &Reference,
        patience: Patience,
    ) -> Result<ResolvedImage, Error> {
        let program = Path::new(process::ITSELF);
        let image = resolve::resolve(program, &self.fetcher, reference, patience.start)
            .map_err(Error::Resolve)?;
        log::info!("{reference} is the image {}", image.manifest);
        Ok(image)
    }

    /// Starts a fetcher and lets it know of the layers, and of the one that holds the image's trace. It
    /// downloads them whole if the image says so,
    /// or the service configuration for images that say nothing.
    ///
    /// # Errors
    /// [`Error::Layers`].
    pub fn attach(
        &self,
        layers: LocalLayers,
        trace: Option<Arc<RemoteBlob>>,
        download: Option<&download::Download>,
    ) -> Result<(AttachedLayers, Control), Error> {
        let download = download.or(self.download.as_ref());
        let download = download.and_then(Download::configured);
        let program = Path::new(process::ITSELF);
        let fetcher = Process::start(program, &self.fetcher).map_err(Error::Fetcher)?;
        let attached = layers
            .attach(&fetcher, trace, download)
            .map_err(Error::Layers)?;
        Ok((attached, fetcher.into_control()))
    }
}
