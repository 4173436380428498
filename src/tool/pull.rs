//! `ovbd pull`: has a fetcher bring all layers of an image into the cache.
//!
//! The fetcher talks to the registry, in its sandbox. This process waits for it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use indicatif::ProgressBar;
use serde::{Serialize, Serializer};
use thiserror::Error;

use super::table::size;
use crate::cache::{self, Cache};
use crate::fetch::process::{self, Config, Process, ProcessError};
use crate::fetch::resolve::{ResolveError, resolve};
use crate::format::digest::Digest;
use crate::registry::args::RegistryArgs;
use crate::registry::reference::Reference;
use crate::source::client::{Client, Patience};
use crate::source::counts::{self, Counts};
use crate::source::{FetchError, LayerRef, RemoteBlob};

/// Layers that are fetched at a time: most are small, and a round trip each.
const LAYERS: usize = 4;

/// Longest wait for a registry to name the layers of an image.
const PATIENCE: Duration = Duration::from_secs(60);

/// How often progress is shown.
const TICK: Duration = Duration::from_millis(100);

/// How long the fetcher may take to tell what it did.
const COUNTING: Duration = Duration::from_secs(5);

/// What to pull, and how.
#[derive(Debug)]
pub struct Pull {
    /// The image.
    pub reference: Reference,
    /// The cache directory.
    pub cache: PathBuf,
    /// How to talk to the registry.
    pub registry: RegistryArgs,
}

/// What was pulled. Field names are those of the JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Pulled {
    /// Digest of the image's manifest.
    #[serde(serialize_with = "as_text")]
    pub manifest: Digest,
    /// Number of layers of the disk.
    pub layers: usize,
    /// Bytes of all layers.
    pub bytes: u64,
    /// Bytes that were fetched.
    pub fetched: u64,
}

fn as_text<S: Serializer>(digest: &Digest, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(digest)
}

impl fmt::Display for Pulled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            manifest, layers, ..
        } = self;
        let (bytes, fetched) = (size(self.bytes), size(self.fetched));
        writeln!(
            f,
            "{manifest}: {layers} layers, {bytes}, {fetched} of them fetched"
        )
    }
}

/// An image cannot be pulled.
#[derive(Debug, Error)]
pub enum Error {
    /// The registry does not serve the image.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// The fetcher cannot be started.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// The cache cannot be read.
    #[error(transparent)]
    Cache(Box<cache::Error>),
    /// A layer cannot be fetched.
    #[error("cannot pull {layer}")]
    Layer {
        /// The layer.
        layer: LayerRef,
        /// Why.
        source: FetchError,
    },
}

/// Fetches and verifies all layers of an image, and the one that holds its trace; what the cache has
/// is not fetched again. The program calls [`process::run_if_asked`] at its start.
///
/// # Errors
/// An [`Error`]. What was fetched stays in the cache.
pub fn pull(task: &Pull, bar: &ProgressBar) -> Result<Pulled, Error> {
    let program = Path::new(process::ITSELF);
    let config = Config {
        cache: task.cache.clone(),
        registry: task.registry.clone(),
        sandbox: true,
    };
    let process = Process::start(program, &config)?;
    let image = resolve(&process, &task.reference, PATIENCE)?;
    let layers = image.layers.len();
    let mut blobs: Vec<_> = image.layers.into_iter().chain(image.trace).collect();
    // The same layer twice is one blob.
    blobs.sort_by_key(|blob| blob.digest);
    blobs.dedup_by_key(|blob| blob.digest);
    let bytes = blobs.iter().filter_map(|blob| blob.size).sum();
    bar.set_length(bytes);
    let local = local_bytes(&task.cache, &blobs).map_err(|error| Error::Cache(Box::new(error)))?;
    let socket = process.attach(&blobs, None)?;
    let client = Client::start(socket, Patience::default(), || {});
    let client = client.map_err(ProcessError::Start)?;
    fill_all(&client, &blobs, |fetched| bar.set_position(local + fetched))?;
    let fetched = client.counts(COUNTING).as_ref().map_or(0, fetched);
    Ok(Pulled {
        manifest: image.manifest,
        layers,
        bytes,
        fetched,
    })
}

/// Bytes of the blobs that are in the cache.
fn local_bytes(cache: &Path, blobs: &[Arc<RemoteBlob>]) -> Result<u64, cache::Error> {
    let items = Cache::open(cache)?.list()?;
    let wanted = |digest: &Digest| blobs.iter().any(|blob| blob.digest == *digest);
    let items = items.iter().filter(|item| wanted(&item.digest));
    Ok(items.map(|item| item.present).sum())
}

/// Bytes that the fetcher brought, for all causes.
fn fetched(counts: &Counts) -> u64 {
    let named = counts::NAMES.iter().zip(counts);
    let bytes = named.filter(|(name, _)| name.ends_with("_bytes"));
    bytes.map(|(_, count)| count).sum()
}

/// Has all blobs fetched, several at a time, and tells `progress` the bytes that came so far.
fn fill_all(
    client: &Client,
    blobs: &[Arc<RemoteBlob>],
    progress: impl Fn(u64),
) -> Result<(), Error> {
    let next = AtomicUsize::new(0);
    let error = Mutex::new(None);
    let run = || {
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(blob) = blobs.get(at) else { return };
            if let Err(source) = client.fill(at as u32) {
                // The others end with the layers they are at.
                next.store(blobs.len(), Ordering::Relaxed);
                let layer = LayerRef::Remote(Arc::clone(blob));
                let mut error = error.lock().unwrap_or_else(PoisonError::into_inner);
                error.get_or_insert(Error::Layer { layer, source });
                return;
            }
        }
    };
    thread::scope(|scope| {
        let count = LAYERS.min(blobs.len());
        let threads: Vec<_> = (0..count).map(|_| scope.spawn(run)).collect();
        while !threads.iter().all(|thread| thread.is_finished()) {
            if let Some(counts) = client.counts(COUNTING) {
                progress(fetched(&counts));
            }
            thread::sleep(TICK);
        }
    });
    let error = error.into_inner().unwrap_or_else(PoisonError::into_inner);
    error.map_or(Ok(()), Err)
}
