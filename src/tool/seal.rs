//! `ovbd seal`: seals a writable layer in place.

use std::fmt;
use std::fs;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use super::Error;
use super::layer_writer::Written;
use super::made::Made;
use crate::units::Sectors;
use crate::writable::extent_map::ExtentMap;
use crate::writable::load::{Access, load};
use crate::writable::manifest::Pairs;
use crate::writable::{self, Paths, seal};

/// Result of sealing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sealed {
    /// The layer was sealed, and has these sizes.
    Now(Written),
    /// The layer was sealed already; leftovers of an interrupted run are removed.
    Before,
}

/// What the command prints. Field names are those of the JSON.
#[derive(Debug, Serialize)]
pub struct SealReport {
    /// Whether the layer was sealed before. Only `path` is known of it then.
    sealed_before: bool,
    #[serde(flatten)]
    layer: SealedFile,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum SealedFile {
    Made(Made),
    Before { path: String },
}

impl SealReport {
    /// The report on the layer at `path`, sealed in `time`.
    pub fn new(path: &Path, sealed: Sealed, time: Duration) -> Self {
        Self {
            sealed_before: sealed == Sealed::Before,
            layer: match sealed {
                Sealed::Now(written) => SealedFile::Made(Made::layer(path, written, time)),
                Sealed::Before => SealedFile::Before {
                    path: path.display().to_string(),
                },
            },
        }
    }
}

impl fmt::Display for SealReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.layer {
            SealedFile::Made(made) => writeln!(f, "{made}"),
            SealedFile::Before { .. } => writeln!(f, "the layer was sealed already"),
        }
    }
}

/// Seals the data file, and removes the index file and the journal. Crash-safe: an interrupted run
/// leaves the layer unchanged or sealed; run it again to finish.
///
/// # Errors
/// A file cannot be read or written; another process has the layer open; or a snapshot sealed it,
/// and the disk continues in another layer.
pub fn seal(paths: &Paths) -> Result<Sealed, Error> {
    let sealed = match load(paths, Access::Write, ExtentMap::new()) {
        Ok(loaded) => {
            let data: Sectors = loaded
                .map()
                .iter()
                .filter_map(|extent| Some(extent.data()?.len()))
                .sum();
            let mappings = loaded.seal(paths)?;
            let file = fs::metadata(&paths.data).map_err(|source| Error::Open {
                name: paths.data.display().to_string(),
                source,
            })?;
            Sealed::Now(Written {
                file_len: file.len(),
                data_len: data.bytes(),
                mappings,
            })
        }
        Err(writable::Error::Sealed { .. }) => Sealed::Before,
        Err(error) => return Err(error.into()),
    };
    seal::remove_index(paths)?;
    if sealed == Sealed::Before {
        Pairs::refuse_frozen(paths)?;
    }
    Ok(sealed)
}
