//! State entry of a disk, by which the next node finds the disk again.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::id::DiskId;
use super::process::Identity;
use super::spec::{Content, DiskSpec};

/// Version of the entry's format; an entry of another version is not changed.
pub const VERSION: u32 = 1;

/// One disk, as stored in `STATE/disks/ID.json`. An entry with a field that this node does not know is not read: the field
/// would be lost when the entry is written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// [`VERSION`].
    pub version: u32,
    /// Name of the disk; equals the file's name.
    pub id: DiskId,
    /// Counts changes of the entry that a client can see, from 1.
    pub generation: u64,
    /// The request that made the disk.
    pub spec: DiskSpec,
    /// Content of the disk, with forks resolved.
    pub content: Content,
    /// Directory of the writable layer.
    pub upper: Option<PathBuf>,
    /// Path of the vhost-user socket.
    pub socket: PathBuf,
    /// The process that serves it, when the entry was written.
    pub process: Option<Identity>,
    /// Time of the creation, in seconds since 1970.
    pub created: u64,
}
