//! The cache directory: blobs by digest, whole or in part, shared by all processes of a host.
//!
//! ```text
//!  Cache::entry(digest, length)
//!      |-- blobs/ has it  -> Entry::Complete   read it like a local file
//!      '-- else           -> Entry::Partial    sparse data file + presence map
//!                               | claim(units)            one process fetches a unit (range lock), unless it is stuck
//!                               |   '-> Claim::store      pwrite, then the live bit
//!                               | sync                    fdatasync(data), durable bits, fdatasync(map)
//!                               '-- publish               all present: SHA-256, 0444, rename to blobs/
//!  Cache::demote: blobs/ -> partial/, without the units that turned out damaged
//! ```
//! What survives what:
//!
//! * A killed process leaves data and live bits in the page cache, and no lock.
//! * A power loss leaves the durable bits, which are only set for data that was synced before. The
//!   boot id in the map tells the two apart.
//! * Nothing that a file says is trusted: a map or data file that does not fit is removed, and the
//!   blob is fetched again.
//!
//! In use is what an open data file has a shared `flock` on. The lock belongs to the open file
//! description, so that it lasts as long as any process holds a descriptor of it, be it one that it
//! was sent. Eviction takes the exclusive lock and skips the entry if it does not get it.
//!
//! Locks, in the order in which a thread takes them:
//!
//! | lock | guards | a thread waits for it |
//! |---|---|---|
//! | [`Claim`]: range locks on a map | units being fetched | at most for as long as their fetcher makes progress |
//! | a thread's turn to store, and other range locks | units being written; all units while a blob is verified | at most 1 s |
//! | `lock` file | names in the directory, while files are created, renamed and removed | at most 30 s |
//! | `flock` of a data file | shared: in use; exclusive: being evicted | never |
//!
//! A thread that syncs a blob holds a mutex of that blob, and takes none of these locks meanwhile.
//!
//! There is no network here. The `fetch` module decides what is stored, and when.

mod claim;
mod demote;
mod entry;
mod error;
mod evict;
mod layout;
mod list;
mod lock;
mod manifests;
mod partial;
mod publish;
mod range_lock;
mod tables;
#[cfg(test)]
mod tests;

pub use claim::Claim;
pub use demote::Demotion;
pub use entry::{Entry, Files};
pub use error::Error;
pub use evict::{Evicted, Limits};
pub use list::{Item, Removal};
pub use partial::Partial;
pub use publish::Publication;
pub use tables::{Tables, TablesItem};

use std::path::Path;

use uuid::Uuid;

use crate::io::boot::boot_id;
use layout::Layout;

/// A cache directory.
#[derive(Clone, Debug)]
pub struct Cache {
    layout: Layout,
    boot: Uuid,
}

impl Cache {
    /// Opens the cache in the directory `root`, which is made if it is missing, and taken if it is
    /// empty. Its parents are made too.
    ///
    /// # Errors
    /// [`Error::NotACache`], [`Error::Version`], [`Error::Permissions`] and [`Error::FileSystem`]
    /// if the directory cannot be a cache; [`Error::File`] if it cannot be read or written.
    pub fn open(root: &Path) -> Result<Self, Error> {
        Self::open_in_boot(root, boot_id())
    }

    /// As [`Cache::open`], but makes no directory.
    ///
    /// # Errors
    /// As [`Cache::open`]; [`Error::File`] if there is no such directory.
    pub fn open_existing(root: &Path) -> Result<Self, Error> {
        Layout::open_existing(root)?;
        Self::open(root)
    }

    /// As [`Cache::open`], in a system with this boot id: for tests of what a power loss leaves.
    ///
    /// # Errors
    /// As [`Cache::open`].
    pub fn open_in_boot(root: &Path, boot: Uuid) -> Result<Self, Error> {
        let layout = Layout::open(root)?;
        let cache = Self { layout, boot };
        cache.empty_trash()?;
        Ok(cache)
    }

    /// The cache directory.
    pub fn root(&self) -> &Path {
        self.layout.root()
    }
}
