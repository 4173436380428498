//! Directories and parents of files.

use std::path::Path;
use std::{fs, io};

use super::regular::open_directory;

/// Returns the directory of the file at `path`; `.` for a bare file name.
pub fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Creates the directory `path` and its parents where they are missing.
///
/// # Errors
/// A file that is no directory is at the path, or the system refuses.
pub fn create_all(path: &Path) -> io::Result<()> {
    fs::create_dir_all(path).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => io::Error::new(
            io::ErrorKind::NotADirectory,
            "it exists and is not a directory",
        ),
        _ => error,
    })
}

/// Makes the creation, renaming or removal of the file at `path` durable: syncs its directory.
///
/// # Errors
/// The directory cannot be opened or synced.
pub fn sync_parent(path: &Path) -> io::Result<()> {
    open_directory(parent_of(path))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_has_a_parent() {
        for (path, parent) in [("a", "."), ("a/b", "a"), ("/a", "/"), ("/", "."), ("", ".")] {
            assert_eq!(parent_of(Path::new(path)), Path::new(parent), "{path}");
        }
    }
}
