//! `ovbd pull`: fetches all layers of an image into the cache.

use std::io;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use indicatif::ProgressBar;
use thiserror::Error;

use crate::cache::{self, Cache};
use crate::fetch::{Fetcher, FillError, FillOptions, Offer, Options, RegistryBlob};
use crate::format::digest::Digest;
use crate::registry::blob::BlobRef;
use crate::registry::client::{self, Client};
use crate::registry::error::Error as RegistryError;
use crate::registry::manifest::{self, Manifest};
use crate::registry::reference::Reference;

/// Layers that are fetched at a time: most are small, and a round trip each.
const LAYERS: usize = 4;

/// Requests under way for each layer.
const REQUESTS: usize = 4;

/// Bytes of one request.
const BLOCK_SIZE: u64 = 8 << 20;

/// Give up if no byte of a layer comes for so long.
const PATIENCE: Duration = Duration::from_secs(120);

/// What to pull, and how.
#[derive(Debug)]
pub struct Pull {
    /// The image.
    pub reference: Reference,
    /// The cache directory.
    pub cache: PathBuf,
    /// How to talk to the registry.
    pub registry: client::Options,
}

/// What was pulled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pulled {
    /// Digest of the image's manifest.
    pub manifest: Digest,
    /// Number of layers.
    pub layers: usize,
    /// Bytes of all layers.
    pub bytes: u64,
    /// Bytes that were fetched.
    pub fetched: u64,
}

/// An image cannot be pulled.
#[derive(Debug, Error)]
pub enum Error {
    /// The registry does not serve the image.
    #[error("cannot pull {reference}")]
    Registry {
        /// The image.
        reference: String,
        /// Why.
        source: Box<RegistryError>,
    },
    /// The manifest is not of an OverlayBD image.
    #[error("cannot pull {reference}")]
    Manifest {
        /// The image.
        reference: String,
        /// Why.
        source: Box<manifest::Error>,
    },
    /// The cache cannot be used.
    #[error(transparent)]
    Cache(Box<cache::Error>),
    /// A layer cannot be fetched.
    #[error(transparent)]
    Layer(#[from] FillError),
    /// No thread can be started.
    #[error("cannot start the fetcher")]
    Threads(#[source] io::Error),
}

impl From<cache::Error> for Error {
    fn from(error: cache::Error) -> Self {
        Self::Cache(Box::new(error))
    }
}

/// Fetches and verifies all layers of an image; what the cache has is not fetched again.
///
/// # Errors
/// An [`Error`]. What was fetched stays in the cache.
pub fn pull(task: Pull, bar: &ProgressBar) -> Result<Pulled, Error> {
    let reference = task.reference.to_string();
    let failed = |source: RegistryError| Error::Registry {
        reference: reference.clone(),
        source: Box::new(source),
    };
    let cache = Cache::open(&task.cache)?;
    let client = Arc::new(Client::new(task.registry).map_err(failed)?);
    let found = client.manifest(&task.reference).map_err(failed)?;
    let manifest = Manifest::parse(&found.bytes).map_err(|source| Error::Manifest {
        reference: reference.clone(),
        source: Box::new(source),
    })?;
    cache.keep_manifest(&reference, &found.bytes)?;
    let blobs = manifest.layers().iter().map(|layer| BlobRef {
        repository: task.reference.repository().clone(),
        digest: *layer.digest(),
        size: Some(layer.size()),
    });
    let Filled { bytes, fetched } = fill(&client, cache, blobs.collect(), bar)?;
    Ok(Pulled {
        manifest: found.digest,
        layers: manifest.layers().len(),
        bytes,
        fetched,
    })
}

/// What [`fill`] did.
pub(super) struct Filled {
    /// Bytes of all blobs, as far as their sizes are known.
    bytes: u64,
    /// Bytes that were fetched.
    fetched: u64,
}

/// Fetches and verifies blobs; what the cache has is not fetched again.
pub(super) fn fill(
    client: &Arc<Client>,
    cache: Cache,
    mut blobs: Vec<BlobRef>,
    bar: &ProgressBar,
) -> Result<Filled, Error> {
    // The same layer twice is one blob.
    blobs.sort_by_key(|blob| blob.digest);
    blobs.dedup_by_key(|blob| blob.digest);
    let bytes = blobs.iter().filter_map(|blob| blob.size).sum();
    bar.set_length(bytes);
    let offers = blobs.into_iter().map(|blob| Offer {
        digest: blob.digest,
        len: blob.size,
        origin: Arc::new(RegistryBlob::new(Arc::clone(client), blob)),
    });
    let offers: Vec<_> = offers.collect();
    let options = Options {
        other_threads: LAYERS * REQUESTS,
        ..Options::default()
    };
    let statuses = Arc::clone(client.statuses());
    let fetcher = Fetcher::start(cache, options, statuses).map_err(Error::Threads)?;
    fill_all(&fetcher, &offers, bar)?;
    let fetched = fetcher.counters().background_bytes;
    Ok(Filled { bytes, fetched })
}

fn fill_all(fetcher: &Fetcher, offers: &[Offer], bar: &ProgressBar) -> Result<(), FillError> {
    let options = FillOptions {
        parallel: REQUESTS,
        block_size: BLOCK_SIZE,
        rate: None,
        patience: Some(PATIENCE),
        within_limits: false,
    };
    let next = AtomicUsize::new(0);
    let error = Mutex::new(None);
    let present: Vec<_> = offers.iter().map(|_| AtomicU64::new(0)).collect();
    let run = || {
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(offer) = offers.get(at) else { return };
            let filled = fetcher.fill(offer, options, &mut |bytes| {
                present[at].store(bytes, Ordering::Relaxed);
                let all = present.iter().map(|bytes| bytes.load(Ordering::Relaxed));
                bar.set_position(all.sum());
                ControlFlow::Continue(())
            });
            if let Err(failed) = filled {
                // The others end with the layers they are at.
                next.store(offers.len(), Ordering::Relaxed);
                let mut error = error.lock().unwrap_or_else(PoisonError::into_inner);
                error.get_or_insert(failed);
                return;
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..LAYERS.min(offers.len()) {
            scope.spawn(run);
        }
        run();
    });
    let error = error.into_inner().unwrap_or_else(PoisonError::into_inner);
    error.map_or(Ok(()), Err)
}
