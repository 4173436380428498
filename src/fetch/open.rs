//! Opening the layers of a stack: local files by their paths, blobs of registries by the fetcher.
//!
//! A program that enters a sandbox opens the local files ([`LocalLayers::open`]) and connects to the
//! fetcher ([`LocalLayers::attach`]) before, and gets the blobs' descriptors inside
//! ([`AttachedLayers::open`]). [`open_layers`] does all of it at once.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;

use thiserror::Error;

use super::Download;
use super::process::{Process, ProcessError};
use crate::format::presence::UNIT;
use crate::source::client::{Client, Patience};
use crate::source::protocol::Cause;
use crate::source::{
    self, Blob, FetchError, FetchErrorKind, LayerRef, Located, RemoteBlob, cached,
};

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

/// A layer of a stack.
#[derive(Debug)]
enum Layer {
    Open(Blob),
    Remote(Arc<RemoteBlob>),
}

/// The layers of a stack, of which the local ones are open.
#[derive(Debug)]
pub struct LocalLayers(Vec<Layer>);

/// The layers of a stack that the fetcher knows of.
#[derive(Debug)]
pub struct AttachedLayers {
    layers: Vec<Layer>,
    /// The layer that holds the image's trace.
    trace: Option<Arc<RemoteBlob>>,
    socket: OwnedFd,
}

/// The layers of a stack, open, and the connection that brings what they lack.
#[derive(Debug)]
pub struct OpenLayers {
    /// A blob for each layer, in the order of the layers.
    pub blobs: Vec<Blob>,
    /// The layer that holds the image's trace, if there is one that can be opened.
    pub trace: Option<Blob>,
    /// The connection; call [`Client::start_serving`] once the disk is served.
    pub client: Arc<Client>,
}

impl LocalLayers {
    /// Opens the local files among `layers`.
    ///
    /// # Errors
    /// [`OpenError::File`] names the file.
    pub fn open(layers: &[LayerRef]) -> Result<Self, OpenError> {
        source::make_room(layers.len());
        let layers = layers.iter().map(|layer| {
            Ok(match layer {
                LayerRef::File(path) => Layer::Open(Blob::open(path)?),
                LayerRef::Remote(blob) => Layer::Remote(Arc::clone(blob)),
            })
        });
        layers.collect::<Result<_, _>>().map(Self)
    }

    /// Lets the fetcher know of the others and of the layer that holds the image's trace, and
    /// downloads them in the background if that is asked for.
    ///
    /// # Errors
    /// [`OpenError::Process`]: the fetcher's keeper is gone, or the system refuses a socket.
    pub fn attach(
        self,
        process: &Process,
        trace: Option<Arc<RemoteBlob>>,
        download: Option<Download>,
    ) -> Result<AttachedLayers, OpenError> {
        let layers = self.0;
        let mut blobs = remotes(&layers);
        blobs.extend(trace.clone());
        let socket = process.attach(&blobs, download)?;
        Ok(AttachedLayers {
            layers,
            trace,
            socket,
        })
    }
}

impl AttachedLayers {
    /// Opens the blobs of registries. Waits for the fetcher, at most as long as `patience` says for
    /// a start; reads no byte of any layer. The thread that receives bytes from then on calls
    /// `prepare` first.
    ///
    /// # Errors
    /// An [`OpenError`] that names the layer.
    pub fn open(
        self,
        patience: Patience,
        prepare: impl FnOnce() + Send + 'static,
    ) -> Result<OpenLayers, OpenError> {
        let client = Client::start_with(self.socket, patience, prepare);
        let client = Arc::new(client.map_err(ProcessError::Start)?);
        let mut blobs = remotes(&self.layers);
        let trace = self.trace.map(|trace| (blobs.len(), trace));
        blobs.extend(trace.as_ref().map(|(_, trace)| Arc::clone(trace)));
        let mut opened = open_remotes(&client, &blobs);
        let trace = trace.and_then(|(number, _)| opened.drain(number..).next());
        let trace = trace.and_then(|trace| {
            trace
                .inspect_err(|error| log::warn!("the trace of the image is not used: {error}"))
                .ok()
        });
        let mut numbered = opened.into_iter();
        let blobs = self.layers.into_iter().map(|layer| match layer {
            Layer::Open(blob) => Ok(blob),
            Layer::Remote(blob) => {
                let gone = || {
                    FetchError::new(
                        FetchErrorKind::System,
                        "the thread that opens blobs ended unexpectedly",
                    )
                };
                let opened = numbered.next().unwrap_or_else(|| Err(gone()));
                let layer = LayerRef::Remote(blob);
                opened.map_err(|source| OpenError::Remote { layer, source })
            }
        });
        let blobs = blobs.collect::<Result<_, _>>()?;
        Ok(OpenLayers {
            blobs,
            trace,
            client,
        })
    }
}

/// Opens layers for a program without a sandbox: see [`AttachedLayers::open`].
///
/// # Errors
/// An [`OpenError`] that names the layer.
pub fn open_layers(
    process: &Process,
    layers: &[LayerRef],
    patience: Patience,
    download: Option<Download>,
) -> Result<OpenLayers, OpenError> {
    let attached = LocalLayers::open(layers)?.attach(process, None, download)?;
    attached.open(patience, || {})
}

/// The blobs of registries. Their places in this list are their numbers.
fn remotes(layers: &[Layer]) -> Vec<Arc<RemoteBlob>> {
    let remote = |layer: &Layer| match layer {
        Layer::Open(_) => None,
        Layer::Remote(blob) => Some(Arc::clone(blob)),
    };
    layers.iter().filter_map(remote).collect()
}

fn open_remote(
    client: &Arc<Client>,
    number: u32,
    blob: &Arc<RemoteBlob>,
) -> Result<Blob, FetchError> {
    let blob = cached::open(client, number, blob)?;
    for bytes in needed_to_load(blob.len()) {
        let len = (bytes.end - bytes.start) as usize;
        if let Located::Absent(_) = blob.locate(bytes.start, len) {
            client.suggest(number, bytes, Cause::Start);
        }
    }
    Ok(blob)
}

/// What loading a layer of `len` bytes reads: the headers at its start; the index and the table of
/// compressed blocks, which has 4 bytes for 4 KiB, at its end. A small layer is fetched whole.
/// Asked for at once, so that loading takes one round trip and not one for each step.
fn needed_to_load(len: u64) -> impl Iterator<Item = Range<u64>> {
    const WHOLE: u64 = 1 << 20;
    let tail = (len / 256).clamp(2 * UNIT, 4 << 20);
    let (head, tail) = match len <= WHOLE {
        true => (0..len, None),
        false => (0..UNIT, Some(len - tail..len)),
    };
    std::iter::once(head).chain(tail)
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
                .map(|(blob, number)| scope.spawn(move || open_remote(client, number, blob)))
                .collect();
            opened.extend(threads.into_iter().filter_map(|thread| thread.join().ok()));
        });
    }
    opened
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_is_loaded_with_two_ranges_and_a_small_one_with_one() {
        let needed = |len| needed_to_load(len).collect::<Vec<_>>();
        assert_eq!(needed(1), [Range { start: 0, end: 1 }]);
        assert_eq!(
            needed(1 << 20),
            [Range {
                start: 0,
                end: 1 << 20
            }]
        );
        let len = (1 << 20) + 1;
        assert_eq!(needed(len), [0..UNIT, len - 2 * UNIT..len]);
        let len = 256 << 20;
        assert_eq!(needed(len), [0..UNIT, len - (1 << 20)..len]);
        let len = 4 << 40;
        assert_eq!(needed(len), [0..UNIT, len - (4 << 20)..len]);
    }
}
