//! Opening the layers of a stack: local files by their paths, blobs of registries by the fetcher.

use std::sync::Arc;
use std::thread;

use thiserror::Error;

use super::Download;
use super::process::{Process, ProcessError};
use crate::source::client::{Client, Patience};
use crate::source::{self, Blob, FetchError, LayerRef, RemoteBlob, cached};

/// Blobs that are opened at a time.
const AT_A_TIME: usize = 16;

/// A layer cannot be opened.
#[derive(Debug, Error)]
pub enum OpenError {
    /// A local file cannot be opened.
    #[error(transparent)]
    File(#[from] source::Error),
    /// A blob of a registry cannot be opened.
    #[error("cannot open {layer}")]
    Remote {
        /// The blob.
        layer: LayerRef,
        /// Why.
        source: FetchError,
    },
    /// The fetcher does not take the connection.
    #[error(transparent)]
    Process(#[from] ProcessError),
}

/// The layers of a stack, open, and the connection that brings what they lack.
#[derive(Debug)]
pub struct OpenLayers {
    /// A blob for each layer, in the order of the layers.
    pub blobs: Vec<Blob>,
    /// The connection; call [`Client::start_serving`] once the disk is served.
    pub client: Arc<Client>,
}

/// Opens layers. Waits for the fetcher, at most as long as `patience` says for a start; reads no
/// byte of any layer.
///
/// # Errors
/// An [`OpenError`] that names the layer.
pub fn open_layers(
    process: &Process,
    layers: &[LayerRef],
    patience: Patience,
    download: Option<Download>,
) -> Result<OpenLayers, OpenError> {
    let remote = |layer: &LayerRef| match layer {
        LayerRef::File(_) => None,
        LayerRef::Remote(blob) => Some(Arc::clone(blob)),
    };
    let remotes: Vec<_> = layers.iter().filter_map(remote).collect();
    let socket = process.attach(&remotes, download)?;
    let client = Client::start(socket, patience).map_err(ProcessError::Start)?;
    let client = Arc::new(client);
    let mut numbered = open_remotes(&client, &remotes).into_iter();
    let blobs = layers.iter().map(|layer| match layer {
        LayerRef::File(path) => Ok(Blob::open(path)?),
        LayerRef::Remote(_) => {
            let gone = || FetchError::new(source::FetchErrorKind::System, "a thread died");
            let opened = numbered.next().unwrap_or_else(|| Err(gone()));
            opened.map_err(|source| OpenError::Remote {
                layer: layer.clone(),
                source,
            })
        }
    });
    let blobs = blobs.collect::<Result<_, _>>()?;
    Ok(OpenLayers { blobs, client })
}

/// Opens blobs side by side: each may wait for the cache's lock, and one of unknown length for its
/// registry.
fn open_remotes(
    client: &Arc<Client>,
    remotes: &[Arc<RemoteBlob>],
) -> Vec<Result<Blob, FetchError>> {
    let mut opened = Vec::new();
    for (chunk, first) in remotes.chunks(AT_A_TIME).zip((0..).step_by(AT_A_TIME)) {
        thread::scope(|scope| {
            let threads: Vec<_> = chunk
                .iter()
                .zip(first..)
                .map(|(blob, number)| scope.spawn(move || cached::open(client, number, blob)))
                .collect();
            opened.extend(threads.into_iter().filter_map(|thread| thread.join().ok()));
        });
    }
    opened
}
