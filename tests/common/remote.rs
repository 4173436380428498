//! The daemon with a disk whose layers are in a registry.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use ovbd_vhost::format::digest::Digest;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::content::tagged;
use crate::daemon::Daemon;
use crate::layers::{LayerBuilder, Pack, wrap_tar, zfile};

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

    /// The entries of an image config for these layers.
    pub fn lowers(&self) -> Vec<Value> {
        let lower =
            |blob: &Vec<u8>| json!({"digest": Digest::of(blob).to_string(), "size": blob.len()});
        self.blobs.iter().map(lower).collect()
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
        let options: Vec<_> = options
            .iter()
            .map(String::as_str)
            .chain(more.iter().copied())
            .collect();
        Daemon::with::<&str>(&[], &options)
    }

    /// Moves the cache away. A fetcher that still runs keeps it.
    pub fn forget_cache(&self) {
        let old = (0..).map(|number| self.path(&format!("cache-{number}")));
        let mut unused = old.filter(|path| !path.exists());
        let old = unused.next().expect("a name");
        fs::rename(self.path("cache"), old).expect("a cache");
    }

    /// The content of the result file.
    pub fn result(&self) -> String {
        fs::read_to_string(self.path("result")).unwrap_or_default()
    }
}
