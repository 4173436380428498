//! The daemon with a disk whose layers are in a registry.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ovbd_vhost::format::digest::Digest;
use rustls::ServerConfig;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::content::tagged;
use crate::daemon::{self, Daemon};
use crate::layers::{LayerBuilder, Pack, wrap_tar, zfile};
use crate::registries;
use crate::registry_server::{Received, Reply, Server, answer, serve};

/// Repository of all layers.
pub const REPOSITORY: &str = "team/app";

/// The layers of an image as a registry stores them, and what the disk must read as.
pub struct Layers {
    /// The blobs, bottom first.
    pub blobs: Vec<Vec<u8>>,
    /// Every byte of the disk.
    pub content: Arc<Vec<u8>>,
}

impl Layers {
    /// An image of `mib` MiB: the second of two layers covers every other 64 KiB of the first.
    pub fn new(mib: usize) -> Layers {
        const PIECE: usize = 64 << 10;
        let len = mib << 20;
        let mut content = tagged(len, 1);
        let above = tagged(len, 2);
        let bottom = LayerBuilder::new(len as u64).uuids(1, 0).data(0, &content);
        let mut top = LayerBuilder::new(len as u64).uuids(2, 1);
        for start in (0..len).step_by(2 * PIECE) {
            let piece = &above[start..start + PIECE];
            top = top.data(start as u64 / 512, piece);
            content[start..start + PIECE].copy_from_slice(piece);
        }
        let blob = |layer: LayerBuilder| wrap_tar(&zfile(&layer.lsmt(), Pack::default()));
        Layers {
            blobs: vec![blob(bottom), blob(top)],
            content: Arc::new(content),
        }
    }

    /// An image of `count` layers, each of which covers `piece` bytes of the disk that no other
    /// covers. The bytes of the blobs are nearly as many.
    pub fn side_by_side(count: usize, piece: usize) -> Layers {
        let content = tagged(count * piece, 3);
        let blob = |(number, bytes): (usize, &[u8])| {
            let start = number * piece / 512;
            let uuids = (number as u128 + 1, number as u128);
            let layer = LayerBuilder::new(content.len() as u64).uuids(uuids.0, uuids.1);
            let layer = layer.data(start as u64, bytes);
            wrap_tar(&zfile(&layer.lsmt(), Pack::default()))
        };
        Layers {
            blobs: content.chunks(piece).enumerate().map(blob).collect(),
            content: Arc::new(content),
        }
    }

    /// An image of one layer that is stored uncompressed, without any checksum.
    pub fn plain(mib: usize) -> Layers {
        let content = tagged(mib << 20, 4);
        let layer = LayerBuilder::new(content.len() as u64).uuids(1, 0);
        Layers {
            blobs: vec![layer.data(0, &content).lsmt()],
            content: Arc::new(content),
        }
    }

    /// A registry that has the blobs.
    pub fn registry(&self) -> Server {
        self.registry_that(serve)
    }

    /// A registry that gives this reply to a request for a blob.
    pub fn registry_that(
        &self,
        reply: impl Fn(&Received, &[u8]) -> Reply + Send + Sync + 'static,
    ) -> Server {
        Server::start(self.handler(reply))
    }

    /// A registry behind TLS that has the blobs.
    pub fn registry_tls(&self, tls: Arc<ServerConfig>) -> Server {
        Server::start_tls(tls, self.handler(serve))
    }

    /// A registry that has the blobs, and gives this reply while it is away.
    pub fn registry_with_outages(&self, otherwise: Reply) -> Outages {
        let away = Arc::<AtomicBool>::default();
        let is_away = Arc::clone(&away);
        let server =
            self.registry_that(move |request, blob| match is_away.load(Ordering::SeqCst) {
                true => otherwise.clone(),
                false => serve(request, blob),
            });
        Outages { server, away }
    }

    /// What a registry does that gives this reply to a request for a blob.
    pub fn handler(
        &self,
        reply: impl Fn(&Received, &[u8]) -> Reply + Send + Sync + 'static,
    ) -> impl Fn(&Received) -> Reply + Send + Sync + 'static {
        let named = |blob: &Vec<u8>| (Digest::of(blob).to_string(), blob.clone());
        let blobs: Vec<_> = self.blobs.iter().map(named).collect();
        move |request| {
            let path = request.target.split('?').next().unwrap_or_default();
            let mut found = blobs.iter().filter(|(digest, _)| path.ends_with(digest));
            match found.next() {
                Some((_, blob)) => reply(request, blob),
                None => answer(404, &[], b""),
            }
        }
    }

    /// The manifest of an image with these layers.
    pub fn manifest(&self) -> Value {
        let layer = |blob: &Vec<u8>| registries::layer(&Digest::of(blob), blob.len() as u64);
        let layers = self.blobs.iter().map(layer).collect();
        registries::manifest(&Digest::of(b"{}"), layers)
    }

    /// The entries of an image config for these layers.
    pub fn lowers(&self) -> Vec<Value> {
        let lower =
            |blob: &Vec<u8>| json!({"digest": Digest::of(blob).to_string(), "size": blob.len()});
        self.blobs.iter().map(lower).collect()
    }
}

/// A registry that a test takes away and brings back.
pub struct Outages {
    server: Server,
    away: Arc<AtomicBool>,
}

impl Outages {
    /// From now on, requests get another reply.
    pub fn take_away(&self) {
        self.away.store(true, Ordering::SeqCst);
    }

    /// From now on, blobs are served.
    pub fn bring_back(&self) {
        self.away.store(false, Ordering::SeqCst);
    }

    /// `HOST:PORT`.
    pub fn host(&self) -> String {
        self.server.host()
    }

    /// Number of requests so far.
    pub fn count(&self) -> usize {
        self.server.count()
    }
}

/// A directory with an image config, a result file and a cache.
pub struct Place {
    dir: TempDir,
}

impl Default for Place {
    fn default() -> Place {
        let dir = tempfile::tempdir().expect("a folder");
        Place { dir }
    }
}

impl Place {
    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes an image config whose remote layers are in a registry at `host`, reached by `scheme`.
    pub fn config(&self, scheme: &str, host: &str, lowers: &[Value], more: Value) {
        let mut config = json!({
            "repoBlobUrl": format!("{scheme}://{host}/v2/{REPOSITORY}/blobs"),
            "lowers": lowers,
            "upper": {},
            "resultFile": self.path("result"),
        });
        if let (Some(config), Value::Object(more)) = (config.as_object_mut(), more) {
            config.extend(more);
        }
        fs::write(self.path("config.v1.json"), config.to_string()).expect("a config");
    }

    /// Command-line options for the config and the cache.
    pub fn options(&self) -> Vec<String> {
        let path = |name| self.path(name).display().to_string();
        let mut options = vec!["--config".to_owned(), path("config.v1.json")];
        options.extend(["--cache".to_owned(), path("cache")]);
        options
    }

    /// Serves the config.
    pub fn serve(&self, more: &[&str]) -> Daemon {
        let options = self.options();
        let all = options.iter().map(String::as_str);
        let all: Vec<_> = all.chain(more.iter().copied()).collect();
        Daemon::with::<&str>(&[], &all)
    }

    /// Command-line options for the image of [`REPOSITORY`] that `selector` names (`:TAG`, `@DIGEST`), in a
    /// registry at `host` that speaks plain HTTP.
    pub fn image_options(&self, host: &str, selector: &str) -> Vec<String> {
        let reference = format!("{host}/{REPOSITORY}{selector}");
        let cache = self.path("cache").display().to_string();
        let options = [
            ("--image", reference.as_str()),
            ("--insecure-registry", host),
            ("--cache", &cache),
        ];
        let options = options.iter().flat_map(|(name, value)| [*name, *value]);
        options.map(str::to_owned).collect()
    }

    /// Serves an image by its reference.
    pub fn serve_image(&self, host: &str, selector: &str, more: &[&str]) -> Daemon {
        let options = self.image_options(host, selector);
        let all = options.iter().map(String::as_str);
        let all: Vec<_> = all.chain(more.iter().copied()).collect();
        Daemon::with::<&str>(&[], &all)
    }

    /// Starts the daemon with an image where it must not come to serving.
    pub fn run_image(&self, host: &str, selector: &str, more: &[&str]) -> Output {
        self.run_with(self.image_options(host, selector), more)
    }

    /// Serves the config in a mount namespace of its own: see [`Daemon::in_namespace`].
    pub fn serve_in_namespace(&self, setup: &str, more: &[&str]) -> Daemon {
        let options = self.options();
        let all = options.iter().map(String::as_str);
        let all: Vec<_> = all.chain(more.iter().copied()).collect();
        Daemon::in_namespace(setup, &all)
    }

    /// Starts the daemon with the config where it must not come to serving.
    pub fn run(&self, more: &[&str]) -> Output {
        self.run_with(self.options(), more)
    }

    fn run_with(&self, mut options: Vec<String>, more: &[&str]) -> Output {
        options.extend(["--socket".to_owned(), self.path("s").display().to_string()]);
        options.extend(more.iter().map(|option| (*option).to_owned()));
        daemon::run(options)
    }

    /// Moves the cache away. A fetcher that still runs keeps it.
    pub fn forget_cache(&self) {
        let old = (0..).map(|number| self.path(&format!("cache-{number}")));
        let mut unused = old.filter(|path| !path.exists());
        let old = unused.next().expect("a name");
        fs::rename(self.path("cache"), old).expect("a cache");
    }

    /// Whether the cache holds these layers, complete.
    pub fn is_complete(&self, layers: &Layers) -> bool {
        let blobs = self.path("cache/blobs/sha256");
        let mut digests = layers.blobs.iter().map(|blob| Digest::of(blob).hex());
        digests.all(|hex| blobs.join(hex).exists())
    }

    /// The content of the result file.
    pub fn result(&self) -> String {
        fs::read_to_string(self.path("result")).unwrap_or_default()
    }
}

/// What a daemon says on its control socket about the layers that it fetches.
pub fn fetching(control: &Path) -> Value {
    let mut stream = UnixStream::connect(control).expect("the control socket");
    let request = b"GET /api/v1/device HTTP/1.1\r\nHost: x\r\n\r\n";
    stream.write_all(request).expect("a request");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("an answer");
    let (_, body) = text.split_once("\r\n\r\n").expect("a body");
    let device: Value = serde_json::from_str(body).expect("JSON");
    device["fetch"].clone()
}
