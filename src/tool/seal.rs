//! `ovbd seal`: seals a writable layer in place.

use std::fs;

use super::Error;
use super::layer_writer::Written;
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
