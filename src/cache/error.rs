//! Why the cache cannot be used.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::format::digest::Digest;
use crate::source::presence;

/// A cache directory or one of its blobs cannot be used.
#[derive(Debug, Error)]
pub enum Error {
    /// A system call failed on a file or directory of the cache.
    #[error("cannot {doing} {}", path.display())]
    File {
        /// What was being done, as a verb.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// Error of the system.
        source: io::Error,
    },
    /// The file system has no room.
    #[error("no space left for the cache at {}", path.display())]
    Full {
        /// The file that was to grow.
        path: PathBuf,
        /// Error of the system.
        source: io::Error,
    },
    /// The directory holds other files.
    #[error(
        "{} is not a cache directory: expected a file \"version\" or an empty directory; name another directory",
        path.display()
    )]
    NotACache {
        /// The directory.
        path: PathBuf,
    },
    /// The directory is a cache of another version.
    #[error("cache {} has version {found:?}, expected {expected:?}; name another directory", path.display())]
    Version {
        /// The directory.
        path: PathBuf,
        /// First line of the version file.
        found: String,
        /// Version of this program.
        expected: &'static str,
    },
    /// Other users can change the directory.
    #[error(
        "cache {} has mode {mode:03o} and owner {owner}, expected 700 and owner {user}",
        path.display()
    )]
    Permissions {
        /// The directory.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
        /// Its owner.
        owner: u32,
        /// The user that runs this process.
        user: u32,
    },
    /// The file system cannot hold a cache.
    #[error("cache {} is on a file system {lack}; name a directory on a local one", path.display())]
    FileSystem {
        /// The directory.
        path: PathBuf,
        /// What the file system lacks.
        lack: &'static str,
    },
    /// Another process did not let go of the cache's lock.
    #[error("another process has held the lock {} for {seconds} s", path.display())]
    Locked {
        /// The lock file.
        path: PathBuf,
        /// How long this process waited.
        seconds: u64,
    },
    /// The blob in the cache is right, the length that was asked for is not.
    #[error("blob {digest} has {found} bytes; the image config says {expected}")]
    Length {
        /// The blob.
        digest: Digest,
        /// Length according to the caller.
        expected: u64,
        /// Length of the verified file.
        found: u64,
    },
    /// The presence map of a blob cannot be used.
    #[error("cannot use the presence map {}", path.display())]
    Map {
        /// The map file.
        path: PathBuf,
        /// What is wrong with it.
        source: presence::Error,
    },
    /// Bytes were to be stored in a blob that takes no more.
    #[error("blob {digest} is complete and accepts no more bytes")]
    Closed {
        /// The blob.
        digest: Digest,
    },
    /// Bytes were to be stored that were asked for before all units of the blob were dropped.
    #[error(
        "blob {digest} had a wrong digest and is fetched again; these bytes were fetched before"
    )]
    Restarted {
        /// The blob.
        digest: Digest,
    },
    /// Another process writes or verifies the same units for long.
    #[error(
        "another process verifies blob {digest} or writes the same bytes; the fetch is repeated"
    )]
    Contended {
        /// The blob.
        digest: Digest,
    },
    /// Bytes were to be stored that are no whole units of the blob.
    #[error("{len} bytes at byte {offset} are not whole units of blob {digest}")]
    NotUnits {
        /// The blob.
        digest: Digest,
        /// Where they were to be stored.
        offset: u64,
        /// How many there were.
        len: usize,
    },
}

impl Error {
    /// Turns the system's error on `path` into [`Error::Full`] or [`Error::File`].
    pub(super) fn file(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::Full { path, source }
            }
            _ => Self::File {
                doing,
                path,
                source,
            },
        }
    }

    /// Whether eviction may help.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Full { .. })
    }
}
