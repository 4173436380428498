//! Reference to a layer, as images, tools and options use it: a local file, or a blob in a registry.
#![cfg_attr(
    not(test),
    warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)
)]

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Serialize, Serializer};

use super::{Blob, Error};
use crate::format::digest::Digest;

/// Reference to the bytes of one layer.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum LayerRef {
    /// A local file with all bytes.
    File(Arc<Path>),
    /// A blob in a registry.
    Remote(Arc<RemoteBlob>),
}

/// A blob in a registry.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RemoteBlob {
    /// Digest of the blob.
    pub digest: Digest,
    /// Size in bytes, if the image declares it.
    pub size: Option<u64>,
    /// URL of the repository's blobs, without a trailing slash. The URL of the blob is this, a slash, and
    /// the digest.
    pub blobs_url: String,
}

impl LayerRef {
    /// Makes a relative path absolute.
    ///
    /// # Errors
    /// Those of [`std::path::absolute`]: the current directory cannot be found, or the path is empty.
    pub fn absolute(&self) -> io::Result<Self> {
        match self {
            Self::File(path) => {
                let absolute = std::path::absolute(path)?;
                // One path is kept once, however many references there are to it.
                Ok(match absolute.as_os_str() == path.as_os_str() {
                    true => self.clone(),
                    false => absolute.into(),
                })
            }
            Self::Remote(_) => Ok(self.clone()),
        }
    }

    /// Opens a local file.
    ///
    /// # Errors
    /// Those of [`Blob::open`]; [`Error::Remote`] for a blob in a registry.
    pub fn open(&self) -> Result<Blob, Error> {
        match self {
            Self::File(path) => Blob::open(path),
            Self::Remote(_) => Err(Error::Remote {
                layer: self.clone(),
            }),
        }
    }

    /// Path of a local file.
    pub fn file(&self) -> Option<&Path> {
        match self {
            Self::File(path) => Some(path),
            Self::Remote(_) => None,
        }
    }
}

impl fmt::Display for LayerRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Remote(blob) => write!(f, "{}/{}", blob.blobs_url, blob.digest),
        }
    }
}

impl Serialize for LayerRef {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl From<PathBuf> for LayerRef {
    fn from(path: PathBuf) -> Self {
        Self::File(path.into())
    }
}

impl From<&PathBuf> for LayerRef {
    fn from(path: &PathBuf) -> Self {
        Self::File(path.as_path().into())
    }
}

impl From<&Path> for LayerRef {
    fn from(path: &Path) -> Self {
        Self::File(path.into())
    }
}

impl From<&LayerRef> for LayerRef {
    fn from(layer: &LayerRef) -> Self {
        layer.clone()
    }
}
