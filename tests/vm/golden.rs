//! Images that upstream's tools wrote, with what they must show (`tests/data/MANIFEST.json`).

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::process::{command, output};

/// One image.
pub struct Golden {
    /// Its layers, bottom first.
    pub layers: Vec<PathBuf>,
    /// Its virtual size in bytes.
    pub size: u64,
    /// SHA-256 of the whole disk, in hexadecimal.
    pub sha256: String,
}

impl Golden {
    /// The image of this name.
    pub fn open(name: &str) -> Self {
        let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
        let text = fs::read_to_string(data.join("MANIFEST.json")).expect("manifest");
        let manifest: Value = serde_json::from_str(&text).expect("manifest is JSON");
        let cases = manifest["cases"]
            .as_array()
            .or(manifest.as_array())
            .expect("list of images");
        let case = cases
            .iter()
            .find(|case| case["name"] == name)
            .expect("image in the manifest");
        let layers = case["layers"].as_array().expect("layers");
        let path = |layer: &Value| data.join(layer["path"].as_str().expect("path"));
        Self {
            layers: layers.iter().map(path).collect(),
            size: case["vsize"].as_u64().expect("size"),
            sha256: case["raw_sha256"].as_str().expect("hash").to_owned(),
        }
    }

    /// Writes its content to a raw file in `dir`, checked against the manifest.
    pub fn export(&self, dir: &Path) -> PathBuf {
        let raw = dir.join("raw.img");
        let stack: Vec<_> = self
            .layers
            .iter()
            .map(|path| path.to_str().expect("path"))
            .collect();
        output(
            command(env!("CARGO_BIN_EXE_ovbd"))
                .args(["export", &stack.join(","), "-o"])
                .arg(&raw),
        );
        assert_eq!(sha256(&fs::read(&raw).expect("raw image")), self.sha256);
        raw
    }
}

/// SHA-256 in hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}
