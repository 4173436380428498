//! The registry: one image, a token server, and a count of what was asked for.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::delay::{Delay, Link};
use common::registries;
use common::registry_server::{Received, Reply, Server, answer, serve};
use ovbd_vhost::format::digest::Digest;
use serde_json::json;

/// Repository and tag of the image.
pub const IMAGE: &str = "team/app:1";

/// Token that the registry expects.
const TOKEN: &str = "0123456789abcdef";

/// An image as a registry stores it.
pub struct Image {
    blobs: HashMap<String, Vec<u8>>,
    manifest: String,
    /// The image config of upstream, without the URL of the blobs.
    lowers: serde_json::Value,
}

impl Image {
    /// An image of these layers, bottom first.
    pub fn new(layers: &[Vec<u8>]) -> Arc<Self> {
        let digests: Vec<_> = layers.iter().map(|bytes| Digest::of(bytes)).collect();
        let sized = || {
            digests
                .iter()
                .zip(layers)
                .map(|(digest, bytes)| (digest, bytes.len()))
        };
        let descriptors = sized().map(|(digest, len)| registries::layer(digest, len as u64));
        let lowers =
            sized().map(|(digest, len)| json!({"digest": digest.to_string(), "size": len}));
        let named = digests
            .iter()
            .map(Digest::to_string)
            .zip(layers.iter().cloned());
        let manifest = registries::manifest(&Digest::of(b"{}"), descriptors.collect());
        Arc::new(Self {
            lowers: lowers.collect(),
            manifest: manifest.to_string(),
            blobs: named.collect(),
        })
    }

    /// Bytes of all layers.
    pub fn bytes(&self) -> u64 {
        self.blobs.values().map(|bytes| bytes.len() as u64).sum()
    }
}

#[derive(Default)]
struct Counts {
    requests: AtomicU64,
    bytes: AtomicU64,
}

/// A registry behind a link.
pub struct Origin {
    _server: Server,
    link: Delay,
    image: Arc<Image>,
    counts: Arc<Counts>,
}

impl Origin {
    /// Serves `image` through `link` to clients that have a token.
    pub fn start(image: &Arc<Image>, link: Link) -> Self {
        let counts = Arc::<Counts>::default();
        let (served, counted) = (Arc::clone(image), Arc::clone(&counts));
        let server = Server::start(move |request| reply(&served, &counted, request));
        Self {
            link: Delay::start(&server.host(), link),
            _server: server,
            image: Arc::clone(image),
            counts,
        }
    }

    /// `HOST:PORT` that clients connect to.
    pub fn host(&self) -> String {
        self.link.host()
    }

    /// Requests so far, those for tokens included.
    pub fn requests(&self) -> u64 {
        self.counts.requests.load(Ordering::Relaxed)
    }

    /// Bytes of blobs that were asked for so far.
    pub fn bytes(&self) -> u64 {
        self.counts.bytes.load(Ordering::Relaxed)
    }

    /// The image config that names the layers.
    pub fn config(&self) -> String {
        let (repository, _) = IMAGE.split_once(':').unwrap_or((IMAGE, ""));
        let url = format!("http://{}/v2/{repository}/blobs", self.host());
        json!({"repoBlobUrl": url, "lowers": self.image.lowers}).to_string()
    }

    /// The reference of the image.
    pub fn reference(&self) -> String {
        format!("{}/{IMAGE}", self.host())
    }

    /// The reference of the image with its digest, which cannot move.
    pub fn pinned(&self) -> String {
        let digest = Digest::of(self.image.manifest.as_bytes());
        format!("{}/{IMAGE}@{digest}", self.host())
    }
}

fn reply(image: &Image, counts: &Counts, request: &Received) -> Reply {
    counts.requests.fetch_add(1, Ordering::Relaxed);
    if request.target.starts_with("/token") {
        let token = json!({"token": TOKEN, "expires_in": 3600}).to_string();
        return answer(200, &[], token.as_bytes());
    }
    if request.header("authorization") != Some(&format!("Bearer {TOKEN}")) {
        let host = request.header("host").unwrap_or_default();
        let challenge = format!("Bearer realm=\"http://{host}/token\",service=\"bench\"");
        return answer(401, &[("WWW-Authenticate", &challenge)], b"{}");
    }
    if request.target.contains("/manifests/") {
        let kind = "application/vnd.oci.image.manifest.v1+json";
        return answer(200, &[("Content-Type", kind)], image.manifest.as_bytes());
    }
    let name = request.target.rsplit('/').next().unwrap_or_default();
    let Some(blob) = image.blobs.get(name) else {
        return answer(404, &[], b"{}");
    };
    let (first, last) = request.range().unwrap_or((0, blob.len() - 1));
    let len = (last + 1).min(blob.len()) - first.min(blob.len());
    counts.bytes.fetch_add(len as u64, Ordering::Relaxed);
    serve(request, blob)
}
