//! `ovbd seal`: a writable layer becomes a sealed one, in place.

use super::Error;
use crate::writable::extent_map::ExtentMap;
use crate::writable::load::{Access, Loaded, load};
use crate::writable::manifest::Pairs;
use crate::writable::{self, Paths, mappings, seal};

/// What sealing came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sealed {
    /// The layer is sealed now, and has this many mappings.
    Now(usize),
    /// It was already. What a run before this one did not come to is done.
    Before,
}

/// Seals the data file and removes the files that belong to it. Killed at any moment, the layer is
/// as it was, or sealed; doing it again does the rest.
///
/// # Errors
/// A file cannot be read or written, or another process has the layer open; or it was sealed already,
/// by a snapshot above which the disk goes on.
pub fn seal(paths: &Paths) -> Result<Sealed, Error> {
    let sealed = match load(paths, Access::Write, ExtentMap::new()) {
        Ok(mut loaded) => {
            loaded.repair_index(paths)?;
            let Loaded {
                data,
                header,
                kind,
                map,
                ..
            } = loaded;
            let mappings: Vec<_> = mappings(&map).collect();
            seal::seal(&data, &paths.data, &header, kind, &mappings)?;
            Sealed::Now(mappings.len())
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
