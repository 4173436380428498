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

use super::download::Download;
use super::process::{Process, ProcessError};
use crate::format::presence::UNIT;
use crate::format::tables::LayerIdentity;
use crate::ratelimited_log;
use crate::reason::reason;
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
        /// Cause.
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

/// What is read of a layer when it is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// Its headers, its index and its block table. They are fetched at once.
    Structures,
    /// Nothing: image tables hold all of it.
    Nothing,
    /// All of it, to be compared with its digest first.
    Whole,
}

/// The layers of a stack, of which the local ones are open.
#[derive(Debug)]
pub struct LocalLayers(Vec<Layer>);

/// The layers of a stack that the fetcher knows of.
#[derive(Debug)]
pub struct AttachedLayers {
    layers: Vec<Layer>,
    /// Whether the last of the attached blobs is the layer that holds the image's trace.
    has_trace: bool,
    attached: AttachedBlobs,
}

/// Blobs of registries that the fetcher knows of.
#[derive(Debug)]
pub struct AttachedBlobs {
    blobs: Vec<Arc<RemoteBlob>>,
    socket: OwnedFd,
}

/// Blobs of registries, and the connection that brings what they lack.
#[derive(Debug)]
pub struct OpenBlobs {
    /// The result for each blob.
    pub blobs: Vec<Result<OpenBlob, OpenError>>,
    /// The connection.
    pub client: Arc<Client>,
}

/// A blob of a registry, open.
#[derive(Debug)]
pub struct OpenBlob {
    /// The blob.
    pub blob: Blob,
    /// Bytes that were local before opening it fetched any.
    pub local_bytes: u64,
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
        let has_trace = trace.is_some();
        let blobs = remotes(&layers).into_iter().chain(trace).collect();
        let attached = AttachedBlobs::attach(process, blobs, download)?;
        Ok(AttachedLayers {
            layers,
            has_trace,
            attached,
        })
    }
}

impl AttachedBlobs {
    /// Lets the fetcher know of `blobs`, and downloads them in the background if that is asked for.
    ///
    /// # Errors
    /// A [`ProcessError`]: the fetcher's keeper is gone, or the system refuses a socket.
    pub fn attach(
        process: &Process,
        blobs: Vec<Arc<RemoteBlob>>,
        download: Option<Download>,
    ) -> Result<Self, ProcessError> {
        // Errors and figures name the URL that is used.
        let reached = |blob| process.registry().reached_blob(blob);
        let blobs: Vec<_> = blobs.iter().map(reached).collect();
        let socket = process.attach(&blobs, download)?;
        Ok(Self { blobs, socket })
    }

    /// Opens the blobs, as [`AttachedLayers::open`] does.
    ///
    /// # Errors
    /// [`ProcessError::Start`]: the process has no descriptor or no thread left.
    pub fn open(
        self,
        patience: Patience,
        needs: Needs,
        prepare: impl FnOnce() + Send + 'static,
    ) -> Result<OpenBlobs, ProcessError> {
        let client = Client::start(self.socket, patience, prepare);
        let client = Arc::new(client.map_err(ProcessError::Start)?);
        let mut opened = open_remotes(&client, &self.blobs, needs).into_iter();
        let opened = self.blobs.into_iter().map(|blob| {
            let opened = opened.next().unwrap_or_else(|| Err(thread_ended()));
            let layer = LayerRef::Remote(blob);
            opened.map_err(|source| OpenError::Remote { layer, source })
        });
        Ok(OpenBlobs {
            blobs: opened.collect(),
            client,
        })
    }
}

impl AttachedLayers {
    /// The identities of the layers, bottom first; `None` if one of them has none.
    ///
    /// # Errors
    /// [`source::Error::Open`] if a file cannot be examined.
    pub fn identities(&self) -> Result<Option<Vec<LayerIdentity>>, source::Error> {
        let identities = self.layers.iter().map(|layer| match layer {
            Layer::Open(blob) => Ok(blob.identity()?.map(|identity| identity.stored())),
            Layer::Remote(blob) => Ok(Some(LayerIdentity::Blob(blob.digest))),
        });
        identities.collect()
    }

    /// Opens the blobs of registries. Waits for the fetcher, at most as long as `patience` says for
    /// a start; reads no byte of any layer, and has those fetched that it `needs`. The thread that
    /// receives bytes from then on calls `prepare` first.
    ///
    /// # Errors
    /// An [`OpenError`] that names the layer.
    pub fn open(
        self,
        patience: Patience,
        needs: Needs,
        prepare: impl FnOnce() + Send + 'static,
    ) -> Result<OpenLayers, OpenError> {
        let OpenBlobs { blobs, client } = self.attached.open(patience, needs, prepare)?;
        let mut opened = blobs;
        let trace = self.has_trace.then(|| opened.pop()).flatten();
        let trace = trace.and_then(|trace| {
            trace
                .inspect_err(|error| {
                    ratelimited_log::warn(format_args!(
                        "cannot use the trace of the image; starting without a trace: {}",
                        reason(error)
                    ))
                })
                .ok()
        });
        let trace = trace.map(|trace| trace.blob);
        let mut numbered = opened.into_iter();
        let blobs = self.layers.into_iter().map(|layer| match layer {
            Layer::Open(blob) => Ok(blob),
            Layer::Remote(blob) => {
                let opened = numbered.next().unwrap_or_else(|| {
                    let (layer, source) = (LayerRef::Remote(blob), thread_ended());
                    Err(OpenError::Remote { layer, source })
                });
                opened.map(|opened| opened.blob)
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

/// The blobs of registries. Their places in this list are their numbers.
fn remotes(layers: &[Layer]) -> Vec<Arc<RemoteBlob>> {
    let remote = |layer: &Layer| match layer {
        Layer::Open(_) => None,
        Layer::Remote(blob) => Some(Arc::clone(blob)),
    };
    layers.iter().filter_map(remote).collect()
}

fn thread_ended() -> FetchError {
    let reason = "the thread that opens blobs ended unexpectedly";
    FetchError::new(FetchErrorKind::System, reason)
}

fn open_remote(
    client: &Arc<Client>,
    number: u32,
    blob: &Arc<RemoteBlob>,
    needs: Needs,
) -> Result<OpenBlob, FetchError> {
    if needs == Needs::Whole {
        client.fill(number)?;
    }
    let blob = cached::open(client, number, blob)?;
    let local_bytes = blob.local_bytes();
    if needs != Needs::Structures {
        return Ok(OpenBlob { blob, local_bytes });
    }
    for bytes in needed_to_load(blob.len()) {
        let len = (bytes.end - bytes.start) as usize;
        if let Located::Absent(_) = blob.locate(bytes.start, len) {
            client.suggest(number, bytes, Cause::Start);
        }
    }
    Ok(OpenBlob { blob, local_bytes })
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
    needs: Needs,
) -> Vec<Result<OpenBlob, FetchError>> {
    let mut opened = Vec::new();
    for (chunk, first) in remotes.chunks(AT_A_TIME).zip((0..).step_by(AT_A_TIME)) {
        thread::scope(|scope| {
            let threads: Vec<_> = chunk
                .iter()
                .zip(first..)
                .map(|(blob, number)| scope.spawn(move || open_remote(client, number, blob, needs)))
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
