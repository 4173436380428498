//! Identity of the bytes of an open blob, by which stacks share layers and tables.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;

use super::LayerRef;
use crate::format::digest::Digest;
use crate::format::tables::LayerIdentity;

/// Identity of the bytes of a blob while it is open: the inode of an open file is not reused.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct BlobIdentity {
    device: u64,
    inode: u64,
    len: u64,
    content: Content,
}

/// Evidence that the file of a blob has the same bytes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Content {
    /// Times of a local file in seconds and nanoseconds.
    Unchanged {
        modified: (i64, i64),
        changed: (i64, i64),
    },
    /// Digest of a blob in the cache, whose file changes while it is filled.
    Digest(Digest),
}

impl BlobIdentity {
    /// Identity of the file with this metadata, which holds a blob of `len` bytes.
    pub(super) fn new(layer: &LayerRef, metadata: &Metadata, len: u64) -> Self {
        let content = match layer {
            LayerRef::File(_) => Content::Unchanged {
                modified: (metadata.mtime(), metadata.mtime_nsec()),
                changed: (metadata.ctime(), metadata.ctime_nsec()),
            },
            LayerRef::Remote(blob) => Content::Digest(blob.digest),
        };
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            len,
            content,
        }
    }

    /// The identity that outlives the process: that of a cached blob is its digest.
    pub fn stored(&self) -> LayerIdentity {
        match self.content {
            Content::Digest(digest) => LayerIdentity::Blob(digest),
            Content::Unchanged { modified, changed } => LayerIdentity::File {
                device: self.device,
                inode: self.inode,
                len: self.len,
                modified,
                changed,
            },
        }
    }
}
