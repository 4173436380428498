//! Operations on the files of a writable layer that several modules share.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::{Error, Paths};
use crate::io::directory::{parent_of, sync_parent};

/// Returns the path with a dot and `suffix` appended.
pub(super) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(".");
    name.push(suffix);
    name.into()
}

/// Removes a file if it exists.
///
/// # Errors
/// [`Error::File`] if it cannot be removed.
pub(super) fn remove_file(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.map_err(Error::file("remove", path)),
    }
}

/// Makes the name of a file durable.
///
/// # Errors
/// [`Error::File`] if its directory cannot be opened or synced.
pub(super) fn sync_name(path: &Path) -> Result<(), Error> {
    sync_parent(path).map_err(Error::file("sync", parent_of(path)))
}

/// Makes the names of both files of a layer durable.
///
/// # Errors
/// [`Error::File`] if a directory cannot be opened or synced.
pub(super) fn sync_names(paths: &Paths) -> Result<(), Error> {
    sync_name(&paths.data)?;
    match parent_of(&paths.index) == parent_of(&paths.data) {
        true => Ok(()),
        false => sync_name(&paths.index),
    }
}
