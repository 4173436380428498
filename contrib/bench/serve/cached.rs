//! The same layers in a registry of this process, and the cache of a host that serves them.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use common::registry_server::{Server, answer, serve};
use ovbd_vhost::format::digest::Digest;
use serde_json::json;
use tempfile::TempDir;

use crate::Result;

/// Longest wait until all of an image is in the cache.
const FILLING: Duration = Duration::from_secs(600);

type Blobs = Arc<Mutex<HashMap<String, Arc<Vec<u8>>>>>;

/// A registry that serves files as blobs.
pub struct Registry {
    server: Server,
    blobs: Blobs,
}

/// A stack of layers in the registry, and a cache that nothing else uses.
#[derive(Clone)]
pub struct Stack {
    dir: Arc<TempDir>,
    digests: Vec<Digest>,
}

impl Registry {
    /// A registry without blobs.
    pub fn start() -> Self {
        let blobs = Blobs::default();
        let served = Arc::clone(&blobs);
        let server = Server::start(move |request| {
            let name = request.target.rsplit('/').next().unwrap_or_default();
            let blobs = served.lock().unwrap_or_else(PoisonError::into_inner);
            let blob = blobs.get(name).cloned();
            drop(blobs);
            blob.map_or_else(|| answer(404, &[], b""), |blob| serve(request, &blob))
        });
        Self { server, blobs }
    }

    /// Puts layers into the registry, bottom first, with an empty cache. The image config asks for a
    /// download of all of them.
    pub fn stack(&self, files: &[PathBuf]) -> Result<Stack> {
        let (mut lowers, mut digests) = (Vec::new(), Vec::new());
        for file in files {
            let bytes = fs::read(file)?;
            let digest = Digest::of(&bytes);
            lowers.push(json!({"digest": digest.to_string(), "size": bytes.len()}));
            digests.push(digest);
            let mut blobs = self.blobs.lock().unwrap_or_else(PoisonError::into_inner);
            blobs.insert(digest.to_string(), Arc::new(bytes));
        }
        let stack = Stack {
            dir: Arc::new(tempfile::tempdir()?),
            digests,
        };
        let config = json!({
            "repoBlobUrl": self.server.url("/v2/bench/image/blobs"),
            "lowers": lowers,
            "download": {"enable": true, "delay": 0, "delayExtra": 0},
        });
        fs::write(stack.config(), config.to_string())?;
        Ok(stack)
    }
}

impl Stack {
    fn config(&self) -> PathBuf {
        self.dir.path().join("config.v1.json")
    }

    fn cache(&self) -> PathBuf {
        self.dir.path().join("cache")
    }

    /// Names the stack to a daemon.
    pub fn name(&self, command: &mut Command) {
        command.arg("--config").arg(self.config());
        command.arg("--cache").arg(self.cache());
    }

    /// Waits until all layers are in the cache and verified.
    pub fn wait_until_local(&self) -> Result<()> {
        let blobs = self.cache().join("blobs/sha256");
        let is_local = |digest: &Digest| Path::new(&blobs).join(digest.hex()).exists();
        let start = Instant::now();
        while !self.digests.iter().all(is_local) {
            if start.elapsed() > FILLING {
                return Err("the image is not in the cache in time".into());
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}
