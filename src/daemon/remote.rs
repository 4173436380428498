//! Layers in registries: the configuration of the fetcher, and its start.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Config, Error};
use crate::fetch::Download;
use crate::fetch::open::{AttachedLayers, LocalLayers};
use crate::fetch::process::{self, Process};
use crate::format::download;
use crate::registry::service_config::ServiceConfig;
use crate::source::RemoteBlob;

/// Access to layers in registries.
#[derive(Debug)]
pub struct Remote {
    fetcher: process::Config,
    /// Directory of the socket of a fetcher that disks share.
    shared: Option<PathBuf>,
    /// Background download of images whose config does not mention it.
    download: Option<download::Download>,
}

impl Remote {
    /// Reads the service configuration, if one is named.
    ///
    /// # Errors
    /// [`Error::ServiceConfig`] if it cannot be used; [`Error::NoCache`] if neither it nor the command
    /// line names a cache directory for `wanted`.
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
            shared: config.shared_fetcher.clone(),
            download: service.download,
        })
    }

    /// The cache directory.
    pub fn cache(&self) -> &Path {
        &self.fetcher.cache
    }

    /// Starts a fetcher, or connects to the shared one.
    ///
    /// # Errors
    /// [`Error::Fetcher`].
    pub fn start(&self) -> Result<Process, Error> {
        let program = Path::new(process::ITSELF);
        let process = match &self.shared {
            Some(directory) => Process::share(program, &self.fetcher, directory),
            None => Process::start(program, &self.fetcher),
        };
        process.map_err(Error::Fetcher)
    }

    /// Registers the layers and the layer of the image's trace with a fetcher. The fetcher downloads whole layers in
    /// the background if `download` says so; without `download`, as the service configuration says. The fetcher serves
    /// the layers until they are dropped.
    ///
    /// # Errors
    /// [`Error::Layers`].
    pub fn attach(
        &self,
        fetcher: Process,
        layers: LocalLayers,
        trace: Option<Arc<RemoteBlob>>,
        download: Option<&download::Download>,
    ) -> Result<AttachedLayers, Error> {
        let download = download.or(self.download.as_ref());
        let download = download.and_then(Download::configured);
        let attached = layers
            .attach(&fetcher, trace, download)
            .map_err(Error::Layers)?;
        // The daemon enters its sandbox without a socket for further orders.
        fetcher.detach();
        Ok(attached)
    }
}
