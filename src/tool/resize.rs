//! `ovbd resize`: sets the disk size of a writable layer.

use std::fmt;

use serde::Serialize;

use super::table::{printable, size};
use crate::writable::{self, Error, Paths};

/// A layer whose size was set. Field names are those of the JSON; sizes are in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Resized {
    /// The data file.
    data: String,
    /// Size of the disk.
    virtual_size: u64,
    /// Size of the disk before.
    old_virtual_size: u64,
}

impl fmt::Display for Resized {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (data, new, old) = (
            printable(&self.data),
            size(self.virtual_size),
            size(self.old_virtual_size),
        );
        writeln!(f, "{data}: disk of {new}, was {old}")
    }
}

/// Makes the disk of a layer `virtual_size` bytes large.
///
/// # Errors
/// Those of [`writable::resize`].
pub fn resize(paths: &Paths, virtual_size: u64, drop_data: bool) -> Result<Resized, Error> {
    let old_virtual_size = writable::resize(paths, virtual_size, drop_data)?;
    Ok(Resized {
        data: paths.data.display().to_string(),
        virtual_size,
        old_virtual_size,
    })
}
