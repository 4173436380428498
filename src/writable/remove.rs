//! Removes the files of a layer that is not part of a disk any more.

use std::path::PathBuf;

use super::files::{remove_file, with_suffix};
use super::{Error, Paths, journal};

/// The index file of a layer and a rewrite of it that was interrupted.
fn index_files(paths: &Paths) -> [PathBuf; 2] {
    [with_suffix(&paths.index, "new"), paths.index.clone()]
}

/// Returns whether one of the files exists.
pub(super) fn layer_exists(paths: &Paths) -> bool {
    let journals = journal::paths(&paths.index);
    let mut indexes = index_files(paths).into_iter().chain(journals);
    paths.data.exists() || indexes.any(|path| path.exists())
}

/// Removes the files that exist.
///
/// # Errors
/// [`Error::File`] if one of them cannot be removed.
pub(super) fn remove_layer(paths: &Paths) -> Result<(), Error> {
    remove_index_files(paths)?;
    remove_file(&paths.data)
}

/// Removes the index file and the journal.
///
/// # Errors
/// [`Error::File`] if one of them cannot be removed.
pub(super) fn remove_index_files(paths: &Paths) -> Result<(), Error> {
    journal::remove(&paths.index)?;
    // The index file last: while it exists, the next start removes the rest.
    index_files(paths)
        .iter()
        .try_for_each(|path| remove_file(path))
}
