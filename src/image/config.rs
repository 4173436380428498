//! Which layers make up an image: a list of paths, or an OverlayBD image config.
#![cfg_attr(
    not(test),
    warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)
)]

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use thiserror::Error;

use super::lineage::Lineage;
use super::paths::Paths;
use crate::format::digest::DigestError;
use crate::format::download::Download;
use crate::io::regular::open_regular;
use crate::source::{LayerRef, RemoteBlob};

/// Largest config file that is read, in bytes.
const MAX_CONFIG: u64 = 1024 * 1024;

/// Name of the trace in the folder of an acceleration layer.
const TRACE_IN_DIR: &str = "trace";

/// Names under which a layer lies in its folder, in the order in which they are tried.
const NAMES_IN_DIR: [&str; 3] = ["overlaybd.commit", ".commit", "overlaybd.sealed"];

/// Why a config does not tell an image.
#[derive(Debug, Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The config file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is too long to be a config.
    #[error("{} is longer than {MAX_CONFIG} bytes; not an image config", path.display())]
    TooLong {
        /// The config file.
        path: PathBuf,
    },
    /// The file is no JSON, or its keys have values of the wrong type.
    #[error("{} is not a valid image config", path.display())]
    Syntax {
        /// The config file.
        path: PathBuf,
        /// What is wrong, with line and column.
        source: serde_json::Error,
    },
    /// It asks for something that this program does not do.
    #[error("{}: {key} is not supported; {hint}", path.display())]
    Unsupported {
        /// The config file.
        path: PathBuf,
        /// The key, with its place.
        key: String,
        /// What to do.
        hint: &'static str,
    },
    /// A lower layer is named that is not there.
    #[error("{}: no layer file for lowers[{number}]: {wanted}", path.display())]
    NoFile {
        /// The config file.
        path: PathBuf,
        /// Number of the entry, from 0, bottom first.
        number: usize,
        /// What was looked for.
        wanted: String,
    },
    /// A lower layer is in a registry, and the config does not say which.
    #[error("{}: lowers[{number}] has a digest, but repoBlobUrl is missing: add repoBlobUrl, or name a local file", path.display())]
    NoRepository {
        /// The config file.
        path: PathBuf,
        /// Number of the entry, from 0, bottom first.
        number: usize,
    },
    /// The digest of a lower layer is not one.
    #[error("{}: invalid digest of lowers[{number}]", path.display())]
    Digest {
        /// The config file.
        path: PathBuf,
        /// Number of the entry, from 0, bottom first.
        number: usize,
        /// What was found.
        source: DigestError,
    },
    /// It names no layer.
    #[error("{}: lowers is empty; expected at least one layer", path.display())]
    NoLowers {
        /// The config file.
        path: PathBuf,
    },
    /// An upper is two files.
    #[error("{}: upper has no {key}; expected both data and index", path.display())]
    HalfUpper {
        /// The config file.
        path: PathBuf,
        /// The key that is missing.
        key: &'static str,
    },
}

/// The layers of an image, bottom first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stack {
    layers: Vec<LayerRef>,
    lineage: Lineage,
}

impl Stack {
    /// A stack of these layers, bottom first.
    pub fn new(layers: impl IntoIterator<Item = impl Into<LayerRef>>) -> Self {
        Self {
            layers: layers.into_iter().map(Into::into).collect(),
            lineage: Lineage::default(),
        }
    }

    /// The same layers, with `lineage` for those that do not lie upon their parents.
    pub fn with_lineage(self, lineage: Lineage) -> Self {
        Self { lineage, ..self }
    }

    /// What to do about layers that do not lie upon their parents.
    pub fn lineage(&self) -> Lineage {
        self.lineage
    }

    /// The layers, bottom first.
    pub fn layers(&self) -> &[LayerRef] {
        &self.layers
    }
}

/// An OverlayBD image config, as the snapshotter writes it.
///
/// It is read first and judged later, by [`ImageConfig::stack_and_upper`], so that a refusal can be reported where
/// the config asks for it.
#[derive(Clone, Debug)]
pub struct ImageConfig {
    path: PathBuf,
    keys: Keys,
}

/// The keys that matter. All others are ignored.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Keys {
    repo_blob_url: Option<String>,
    lowers: Option<Vec<Lower>>,
    upper: Option<Upper>,
    result_file: Option<String>,
    acceleration_layer: Option<bool>,
    record_trace_path: Option<String>,
    download: Option<Download>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Lower {
    file: Option<String>,
    dir: Option<String>,
    digest: Option<String>,
    size: Option<u64>,
    target_file: Option<String>,
    target_digest: Option<String>,
    gzip_index: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Upper {
    index: Option<String>,
    data: Option<String>,
    target: Option<String>,
    gzip_index: Option<String>,
}

const NO_TURBO: &str = "TurboOCI layers need their original tar; convert the image to OverlayBD";

impl ImageConfig {
    /// Reads a config file.
    ///
    /// # Errors
    /// It cannot be read, or is no config.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Read {
            path: path.to_owned(),
            source,
        };
        let mut options = File::options();
        options.read(true);
        let file = open_regular(path, options).map_err(failed)?;
        let mut text = Vec::new();
        file.take(MAX_CONFIG + 1)
            .read_to_end(&mut text)
            .map_err(failed)?;
        if text.len() as u64 > MAX_CONFIG {
            return Err(Error::TooLong {
                path: path.to_owned(),
            });
        }
        let keys = serde_json::from_slice(&text).map_err(|source| Error::Syntax {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            path: path.to_owned(),
            keys,
        })
    }

    /// File that is to get `success` or `failed:<reason>`, if there is one.
    pub fn result_file(&self) -> Option<PathBuf> {
        given(&self.keys.result_file).map(|file| self.resolve(file))
    }

    /// The prefetch trace of the image, or of `recordTracePath`; whether there is one shows when it is
    /// opened.
    pub fn trace(&self) -> Option<PathBuf> {
        let (_, acceleration) = self.lowers();
        let dir = acceleration.and_then(|lower| given(&lower.dir));
        let named = given(&self.keys.record_trace_path);
        dir.map(|dir| self.resolve(dir).join(TRACE_IN_DIR))
            .or(named.map(|path| self.resolve(path)))
    }

    /// The lower layers of the disk, and the one above them that holds a trace.
    fn lowers(&self) -> (&[Lower], Option<&Lower>) {
        let all = self.keys.lowers.as_deref().unwrap_or_default();
        match (self.keys.acceleration_layer, all.split_last()) {
            (Some(true), Some((last, lowers))) => (lowers, Some(last)),
            _ => (all, None),
        }
    }

    /// How the image's layers are downloaded in the background, if the config says it.
    pub fn download(&self) -> Option<&Download> {
        self.keys.download.as_ref()
    }

    /// The layers of the image, and the data and index files of the writable layer above them, if
    /// there is one. With it, there may be no layers.
    ///
    /// # Errors
    /// The config asks for something unsupported, or a layer is not there.
    pub fn stack_and_upper(&self) -> Result<(Stack, Option<Paths>), Error> {
        let keys = &self.keys;
        let mut files = None;
        if let Some(upper) = &keys.upper {
            self.refuse("upper.target", given(&upper.target), NO_TURBO)?;
            self.refuse("upper.gzipIndex", given(&upper.gzip_index), NO_TURBO)?;
            let half = |key| {
                let path = self.path.clone();
                Err(Error::HalfUpper { path, key })
            };
            files = match (given(&upper.data), given(&upper.index)) {
                (None, None) => None,
                (None, Some(_)) => return half("data"),
                (Some(_), None) => return half("index"),
                (Some(data), Some(index)) => Some(Paths {
                    data: self.resolve(data),
                    index: self.resolve(index),
                }),
            };
        }
        let (lowers, _) = self.lowers();
        if lowers.is_empty() && files.is_none() {
            return Err(Error::NoLowers {
                path: self.path.clone(),
            });
        }
        let layers = lowers.iter().enumerate();
        let layers = layers.map(|(number, lower)| self.lower(number, lower));
        let stack = Stack {
            layers: layers.collect::<Result<_, _>>()?,
            lineage: Lineage::default(),
        };
        Ok((stack, files))
    }

    /// One lower layer: a local file if there is one, and otherwise the blob of the registry.
    fn lower(&self, number: usize, lower: &Lower) -> Result<LayerRef, Error> {
        for (key, value) in [
            ("targetFile", &lower.target_file),
            ("targetDigest", &lower.target_digest),
            ("gzipIndex", &lower.gzip_index),
        ] {
            self.refuse(&format!("lowers[{number}].{key}"), given(value), NO_TURBO)?;
        }
        if let Some(file) = given(&lower.file) {
            return Ok(self.resolve(file).into());
        }
        let mut wanted = "the entry has no file, dir or digest".to_owned();
        if let Some(dir) = given(&lower.dir) {
            let dir = self.resolve(dir);
            let mut candidates = NAMES_IN_DIR.iter().map(|name| dir.join(name));
            if let Some(found) = candidates.find(|path| path.exists()) {
                return Ok(found.into());
            }
            wanted = format!("none of {} in {}", NAMES_IN_DIR.join(", "), dir.display());
        }
        if let Some(digest) = given(&lower.digest) {
            let Some(blobs_url) = given(&self.keys.repo_blob_url) else {
                return Err(Error::NoRepository {
                    path: self.path.clone(),
                    number,
                });
            };
            let digest = digest.parse().map_err(|source| Error::Digest {
                path: self.path.clone(),
                number,
                source,
            })?;
            return Ok(LayerRef::Remote(Arc::new(RemoteBlob {
                digest,
                size: lower.size.filter(|size| *size > 0),
                blobs_url: blobs_url.trim_end_matches('/').to_owned(),
            })));
        }
        Err(Error::NoFile {
            path: self.path.clone(),
            number,
            wanted,
        })
    }

    fn refuse(&self, key: &str, value: Option<&str>, hint: &'static str) -> Result<(), Error> {
        match value {
            None => Ok(()),
            Some(_) => Err(Error::Unsupported {
                path: self.path.clone(),
                key: key.to_owned(),
                hint,
            }),
        }
    }

    /// A path of the config: a relative one starts at the config's own folder.
    fn resolve(&self, path: &str) -> PathBuf {
        self.path.parent().unwrap_or(Path::new("")).join(path)
    }
}

/// The value of a key; an empty one counts as absent, as upstream writes all keys.
fn given(value: &Option<String>) -> Option<&str> {
    value.as_deref().filter(|value| !value.is_empty())
}

#[cfg(test)]
mod tests;
