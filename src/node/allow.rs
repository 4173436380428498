//! Paths that requests may name: only below the allowed directories.
//!
//! A path is resolved by the kernel from the directory's descriptor (`openat2` with `RESOLVE_BENEATH`), so that
//! neither `..` nor a symbolic link leads out. The disk process then gets the path of the opened file, free of links.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat, openat2};

use super::error::{Code, Error, Failure};
use crate::io::regular::open_directory;

/// Expected type of a path in a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// A regular file or a block device.
    File,
    /// A directory; its parent must exist, itself need not.
    Directory,
}

/// The allowed directories, open.
#[derive(Debug)]
pub struct AllowedDirs {
    dirs: Vec<(PathBuf, OwnedFd)>,
}

impl AllowedDirs {
    /// Opens the directories.
    ///
    /// # Errors
    /// [`Error::File`] if one does not exist or cannot be opened.
    pub fn open(dirs: &[PathBuf]) -> Result<Self, Error> {
        let open = |dir: &PathBuf| {
            let path = fs::canonicalize(dir).map_err(Error::file("find", dir))?;
            let opened = open_directory(&path).map_err(Error::file("open", dir))?;
            Ok((path, OwnedFd::from(opened)))
        };
        Ok(Self {
            dirs: dirs.iter().map(open).collect::<Result<_, _>>()?,
        })
    }

    /// Returns the real path of `path`, if it lies below an allowed directory and has the expected type.
    ///
    /// # Errors
    /// [`Code::BadRequest`] if it lies elsewhere; [`Code::NoLayer`] if it is missing or has another type.
    pub fn resolve(&self, path: &Path, expected: Expected) -> Result<PathBuf, Failure> {
        if !path.is_absolute() || path.components().any(|part| part == Component::ParentDir) {
            let text = format!(
                "path {}: expected an absolute path without `..`",
                path.display()
            );
            return Err(Failure::new(Code::BadRequest, text));
        }
        for (dir, root) in &self.dirs {
            match path.strip_prefix(dir) {
                Ok(rest) if !rest.as_os_str().is_empty() => {
                    return resolve_below(dir, root, rest, path, expected);
                }
                _ => {}
            }
        }
        let text = format!(
            "path {} is not below a directory given by --allow-dir",
            path.display()
        );
        Err(Failure::new(Code::BadRequest, text))
    }
}

fn resolve_below(
    dir: &Path,
    root: &OwnedFd,
    rest: &Path,
    path: &Path,
    expected: Expected,
) -> Result<PathBuf, Failure> {
    match real_path(root, rest, path, expected) {
        Err(failure) if expected == Expected::Directory && !path.exists() => {
            let Some(name) = rest.file_name() else {
                return Err(failure);
            };
            match rest
                .parent()
                .filter(|parent| !parent.as_os_str().is_empty())
            {
                None => Ok(dir.join(name)),
                Some(parent) => Ok(real_path(root, parent, path, Expected::Directory)?.join(name)),
            }
        }
        resolved => resolved,
    }
}

/// Opens `rest` below `root` without following links out of it, and returns the real path of the file.
fn real_path(
    root: &OwnedFd,
    rest: &Path,
    path: &Path,
    expected: Expected,
) -> Result<PathBuf, Failure> {
    let missing = |reason: String| {
        Failure::new(
            Code::NoLayer,
            format!("cannot use {}: {reason}", path.display()),
        )
    };
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    let opened = openat2(root, rest, flags, Mode::empty(), resolve)
        .map_err(|errno| missing(std::io::Error::from(errno).to_string()))?;
    let kind = fstat(&opened)
        .map(|stat| FileType::from_raw_mode(stat.st_mode))
        .map_err(|errno| missing(std::io::Error::from(errno).to_string()))?;
    let fits = match expected {
        Expected::File => matches!(kind, FileType::RegularFile | FileType::BlockDevice),
        Expected::Directory => kind == FileType::Directory,
    };
    if !fits {
        let wanted = match expected {
            Expected::File => "a regular file or block device",
            Expected::Directory => "a directory",
        };
        return Err(missing(format!("expected {wanted}")));
    }
    let link = format!("/proc/self/fd/{}", opened.as_raw_fd());
    fs::read_link(link).map_err(|error| missing(error.to_string()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn only_paths_below_the_directories_are_taken() {
        let temp = tempfile::tempdir().unwrap();
        let base = fs::canonicalize(temp.path()).unwrap();
        let (inside, outside) = (base.join("in"), base.join("out"));
        fs::create_dir_all(inside.join("a")).unwrap();
        fs::create_dir_all(&outside).unwrap();
        fs::write(inside.join("a/layer"), "x").unwrap();
        fs::write(outside.join("secret"), "x").unwrap();
        symlink(outside.join("secret"), inside.join("escape")).unwrap();
        symlink("a/layer", inside.join("link")).unwrap();
        let allowed = AllowedDirs::open(std::slice::from_ref(&inside)).unwrap();
        let file = |path: PathBuf| allowed.resolve(&path, Expected::File);
        assert_eq!(
            file(inside.join("a/layer")).unwrap(),
            inside.join("a/layer")
        );
        assert_eq!(file(inside.join("link")).unwrap(), inside.join("a/layer"));
        for (path, code) in [
            (inside.join("escape"), Code::NoLayer),
            (inside.join("a"), Code::NoLayer),
            (inside.join("absent"), Code::NoLayer),
            (inside.join("../out/secret"), Code::BadRequest),
            (outside.join("secret"), Code::BadRequest),
            (PathBuf::from("a/layer"), Code::BadRequest),
            (inside.clone(), Code::BadRequest),
        ] {
            assert_eq!(
                file(path.clone()).unwrap_err().code,
                code,
                "{}",
                path.display()
            );
        }
        let new = allowed
            .resolve(&inside.join("a/upper"), Expected::Directory)
            .unwrap();
        assert_eq!(new, inside.join("a/upper"));
        let new = allowed
            .resolve(&inside.join("upper"), Expected::Directory)
            .unwrap();
        assert_eq!(new, inside.join("upper"));
        assert!(
            allowed
                .resolve(&inside.join("absent/upper"), Expected::Directory)
                .is_err()
        );
        assert!(
            allowed
                .resolve(&inside.join("a/layer"), Expected::Directory)
                .is_err()
        );
    }
}
