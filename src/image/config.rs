//! The layers of an image, from a list of paths or from an OverlayBD image config.
#![cfg_attr(
    not(test),
    warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)
)]

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use serde::de::IgnoredAny;
use thiserror::Error;

use super::lineage::Lineage;
use super::paths::Paths;
use crate::format::digest::DigestError;
use crate::format::download::Download;
use crate::io::regular::open_regular;
use crate::source::{LayerRef, RemoteBlob};

/// Longest config file in bytes.
const MAX_CONFIG: u64 = 1024 * 1024;

/// Name of the trace in the directory of an acceleration layer.
const TRACE_IN_DIR: &str = "trace";

/// Names of a layer in its directory, in the order in which they are tried.
const NAMES_IN_DIR: [&str; 3] = ["overlaybd.commit", ".commit", "overlaybd.sealed"];

/// Why a config is not usable.
#[derive(Debug, Error)]
pub enum Error {
    /// An acceleration layer and `recordTracePath`.
    #[error(
        "{}: Cannot record trace while acceleration layer exists: remove `recordTracePath` or the \
         acceleration layer",
        path.display()
    )]
    TwoTraces {
        /// The config file.
        path: PathBuf,
    },
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The config file.
        path: PathBuf,
        /// Error of the system.
        source: io::Error,
    },
    /// The file is longer than the limit.
    #[error("{} is longer than {MAX_CONFIG} bytes; not an image config", path.display())]
    TooLong {
        /// The config file.
        path: PathBuf,
    },
    /// The file is not JSON, or a key has a value of the wrong type.
    #[error("{} is not a valid image config", path.display())]
    Syntax {
        /// The config file.
        path: PathBuf,
        /// Error of the parser, with line and column.
        source: serde_json::Error,
    },
    /// The config uses an unsupported feature.
    #[error("{}: {key} is not supported; {hint}", path.display())]
    Unsupported {
        /// The config file.
        path: PathBuf,
        /// The key, with its path.
        key: String,
        /// What to do.
        hint: &'static str,
    },
    /// No file of a lower layer exists.
    #[error("{}: no layer file for lowers[{number}]: {wanted}", path.display())]
    NoFile {
        /// The config file.
        path: PathBuf,
        /// Number of the entry, from 0, bottom first.
        number: usize,
        /// Names that were tried.
        wanted: String,
    },
    /// A lower layer has only a digest, and the config has no repository.
    #[error("{}: lowers[{number}] has a digest, but repoBlobUrl is missing: add repoBlobUrl, or name a local file", path.display())]
    NoRepository {
        /// The config file.
        path: PathBuf,
        /// Number of the entry, from 0, bottom first.
        number: usize,
    },
    /// The digest of a lower layer is malformed.
    #[error("{}: invalid digest of lowers[{number}]", path.display())]
    Digest {
        /// The config file.
        path: PathBuf,
        /// Number of the entry, from 0, bottom first.
        number: usize,
        /// What was found.
        source: DigestError,
    },
    /// The config names no layer.
    #[error("{}: lowers is empty; expected at least one layer", path.display())]
    NoLowers {
        /// The config file.
        path: PathBuf,
    },
    /// The config names no layer, but has a key that resembles `lowers`.
    #[error("{}: no layers: the key of the layers is \"lowers\"; found \"{found}\"", path.display())]
    Misnamed {
        /// The config file.
        path: PathBuf,
        /// The key that was found.
        found: &'static str,
    },
    /// One of the two files of the upper layer is missing.
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
    /// Creates a stack of these layers, bottom first.
    pub fn new(layers: impl IntoIterator<Item = impl Into<LayerRef>>) -> Self {
        Self {
            layers: layers.into_iter().map(Into::into).collect(),
            lineage: Lineage::default(),
        }
    }

    /// Sets the lineage rules of the stack.
    pub fn with_lineage(self, lineage: Lineage) -> Self {
        Self { lineage, ..self }
    }

    /// Lineage rules of the stack.
    pub fn lineage(&self) -> Lineage {
        self.lineage
    }

    /// The layers, bottom first.
    pub fn layers(&self) -> &[LayerRef] {
        &self.layers
    }
}

/// Path of the prefetch trace that an image config names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TracePath {
    /// In the acceleration layer; it is replayed.
    Layer(PathBuf),
    /// Of `recordTracePath`: an empty file is recorded to, another one is replayed.
    Named(PathBuf),
}

/// An OverlayBD image config, as the snapshotter writes it.
///
/// [`ImageConfig::load`] only parses it; [`ImageConfig::stack_and_upper`] verifies it, so that errors can be
/// written to the `resultFile` that the config names.
#[derive(Clone, Debug)]
pub struct ImageConfig {
    path: PathBuf,
    keys: Keys,
}

/// The keys that are used. Others are ignored.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Keys {
    repo_blob_url: Option<String>,
    lowers: Option<Vec<Lower>>,
    /// Guesses at the name of `lowers`, to be reported.
    lower: Option<IgnoredAny>,
    layers: Option<IgnoredAny>,
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
    /// [`Error::Read`], [`Error::TooLong`] and [`Error::Syntax`].
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

    /// File for the result: `success` or `failed:<reason>`.
    pub fn result_file(&self) -> Option<PathBuf> {
        given(&self.keys.result_file).map(|file| self.resolve(file))
    }

    /// Path of the prefetch trace. The file may not exist.
    ///
    /// # Errors
    /// [`Error::TwoTraces`]: there is an acceleration layer, and `recordTracePath` is set.
    pub fn trace(&self) -> Result<Option<TracePath>, Error> {
        let (_, acceleration) = self.lowers();
        let named = given(&self.keys.record_trace_path);
        match (acceleration, named) {
            (Some(_), Some(_)) => Err(Error::TwoTraces {
                path: self.path.clone(),
            }),
            (Some(lower), None) => {
                Ok(given(&lower.dir)
                    .map(|dir| TracePath::Layer(self.resolve(dir).join(TRACE_IN_DIR))))
            }
            (None, named) => Ok(named.map(|path| TracePath::Named(self.resolve(path)))),
        }
    }

    /// The lower layers of the disk, and the acceleration layer above them, which has a trace.
    fn lowers(&self) -> (&[Lower], Option<&Lower>) {
        let all = self.keys.lowers.as_deref().unwrap_or_default();
        match (self.keys.acceleration_layer, all.split_last()) {
            (Some(true), Some((last, lowers))) => (lowers, Some(last)),
            _ => (all, None),
        }
    }

    /// Settings of the background download, if the config has them.
    pub fn download(&self) -> Option<&Download> {
        self.keys.download.as_ref()
    }

    /// Returns the layers of the image, and the files of the writable layer above them, if there is one. With
    /// a writable layer, the image may have no layers.
    ///
    /// # Errors
    /// All but those of [`ImageConfig::load`].
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
            return Err(self.no_lowers());
        }
        let layers = lowers.iter().enumerate();
        let layers = layers.map(|(number, lower)| self.lower(number, lower));
        let stack = Stack {
            layers: layers.collect::<Result<_, _>>()?,
            lineage: Lineage::default(),
        };
        Ok((stack, files))
    }

    /// Returns one lower layer: a local file if there is one, otherwise the blob in the registry.
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

    fn no_lowers(&self) -> Error {
        let path = self.path.clone();
        let Keys { lower, layers, .. } = &self.keys;
        let guesses = [("lower", lower), ("layers", layers)];
        match guesses.iter().find(|(_, value)| value.is_some()) {
            Some((found, _)) => Error::Misnamed { path, found },
            None => Error::NoLowers { path },
        }
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

    /// Resolves a path of the config. A relative path is relative to the directory of the config.
    fn resolve(&self, path: &str) -> PathBuf {
        self.path.parent().unwrap_or(Path::new("")).join(path)
    }
}

/// Value of a key. An empty value counts as absent: upstream writes all keys.
fn given(value: &Option<String>) -> Option<&str> {
    value.as_deref().filter(|value| !value.is_empty())
}

#[cfg(test)]
mod tests;
