//! Parent directories of files.

use std::io;
use std::path::Path;

use super::regular::open_directory;

/// Returns the directory of the file at `path`; `.` for a bare file name.
pub fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
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
