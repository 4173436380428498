//! Image tables of a disk: found before the sandbox is entered, written once the disk is served.

use std::sync::Arc;
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use super::device::Device;
use super::sources::Sources;
use crate::cache::{self, Cache};
use crate::format::tables;
use crate::image::tables::{SUPPORTED, TablesFile, TablesWriter, WriteError};
use crate::reason::reason;
use crate::source;

/// The image tables of a disk's layers.
#[derive(Debug)]
pub(super) enum Tables {
    /// There is no cache for them, or another process writes them.
    None,
    /// They are in the cache.
    Found(Arc<TablesFile>),
    /// They are to be written.
    Wanted(TablesWriter),
}

#[derive(Debug, thiserror::Error)]
enum FindError {
    #[error(transparent)]
    Source(#[from] source::Error),
    #[error(transparent)]
    Cache(#[from] cache::Error),
}

impl Tables {
    /// Looks for the tables in the cache, and creates an empty file if they are not there. Opens no
    /// layer, and reads nothing but the file. A failure is logged.
    pub(super) fn find(is_recorded: bool, sources: &Sources) -> Self {
        // A trace records what a first open reads.
        if !SUPPORTED || is_recorded {
            return Self::None;
        }
        Self::try_find(sources).unwrap_or_else(|error| {
            log::warn!(
                "cannot use image tables in the cache; reading the layers instead: {}",
                reason(&error)
            );
            Self::None
        })
    }

    fn try_find(sources: &Sources) -> Result<Self, FindError> {
        let Some(directory) = sources.cache() else {
            return Ok(Self::None);
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.unwrap_or_default();
        let layers = sources.identities()?;
        let Some(layers) = layers.filter(|layers| {
            // A layer that is still being written may have the identity that it will have at the end.
            !layers.is_empty() && layers.iter().all(|layer| layer.is_settled(now))
        }) else {
            return Ok(Self::None);
        };
        let key = tables::key(&layers);
        Ok(match Cache::open(directory)?.tables(&key)? {
            cache::Tables::Found(file) => Self::Found(Arc::new(TablesFile::new(file))),
            cache::Tables::Created(file) => Self::Wanted(TablesWriter::new(file, key)),
            cache::Tables::Busy => Self::None,
        })
    }

    /// The tables, if they are in the cache.
    pub(super) fn found(&self) -> Option<Arc<TablesFile>> {
        match self {
            Self::Found(file) => Some(Arc::clone(file)),
            _ => None,
        }
    }

    /// Whether they are to be written.
    pub(super) fn are_wanted(&self) -> bool {
        matches!(self, Self::Wanted(_))
    }

    /// Writes the tables of the disk if they are wanted, by a thread of its own: storage takes a while,
    /// and the disk is served meanwhile. A failure is logged.
    pub(super) fn write(self, device: Arc<Device>) {
        let Self::Wanted(writer) = self else {
            return;
        };
        let write = move || match writer.write(device.volume().image()) {
            Ok(len) => log::debug!("stored image tables of {len} bytes in the cache"),
            // Snapshots lie above the layers, or a layer is being replaced.
            Err(WriteError::Changed) => {
                log::debug!("image tables are not stored: a layer has changed since it was opened")
            }
            Err(error) => log::warn!(
                "cannot store image tables in the cache; the next start reads the layers: {}",
                reason(&error)
            ),
        };
        let thread = thread::Builder::new().name("tables".to_owned());
        if let Err(error) = thread.spawn(write) {
            log::warn!("cannot start the thread that stores image tables in the cache: {error}");
        }
    }
}
