//! `ovbd seal`: seals a writable layer in place.

use super::Error;
use crate::writable::extent_map::ExtentMap;
use crate::writable::load::{Access, load};
use crate::writable::manifest::Pairs;
use crate::writable::{self, Paths, seal};

/// Result of sealing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sealed {
    /// The layer was sealed, with this number of mappings.
    Now(usize),
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
        Ok(loaded) => Sealed::Now(loaded.seal(paths)?),
        Err(writable::Error::Sealed { .. }) => Sealed::Before,
        Err(error) => return Err(error.into()),
    };
    seal::remove_index(paths)?;
    if sealed == Sealed::Before {
        Pairs::refuse_frozen(paths)?;
    }
    Ok(sealed)
}
