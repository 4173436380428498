//! Finding and creating the files of a disk's writable layer.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::Path;
use std::time::Duration;

use rustix::fs::{Access, access};
use uuid::Uuid;

use super::Error;
use super::config::WritableSource;
use super::sources::OpenSources;
use crate::format::lsmt::HEADER_LEN;
use crate::format::lsmt::writable::Kind;
use crate::io::directory::create_all;
use crate::io::file_lock::{LockKind, lock_within};
use crate::io::regular::open_directory;
use crate::writable::manifest::Pairs;
use crate::writable::{self, Paths};

/// How long another process may hold the lock of the directory: until its layer is open.
const LOCK_LIMIT: Duration = Duration::from_secs(10);

/// The files of a writable layer, which may not exist yet, in an existing directory.
#[derive(Debug)]
pub struct WritableFiles {
    paths: Paths,
    /// The locked directory of `--upper-auto`, in which the layer is created if missing. The lock is held
    /// until the layer is open, which has a lock of its own.
    automatic: Option<File>,
}

impl WritableFiles {
    /// Creates the directory of `--upper-auto` if it is missing.
    ///
    /// # Errors
    ///
    /// [`Error::Writable`] if it cannot be created.
    pub fn create_directory(source: &WritableSource) -> Result<(), Error> {
        match source {
            WritableSource::Files(_) => Ok(()),
            WritableSource::Directory(directory) => {
                create_all(directory).map_err(|source| failed("create", directory, source))
            }
        }
    }

    /// Determines the paths of the files, and locks the directory of `--upper-auto`, which must exist.
    ///
    /// # Errors
    ///
    /// [`Error::Writable`] if a directory is missing, if the daemon's user cannot create files in it, or if
    /// another process holds its lock.
    pub fn find(source: &WritableSource) -> Result<Self, Error> {
        let (paths, automatic) = match source {
            WritableSource::Files(paths) => (paths.clone(), None),
            WritableSource::Directory(directory) => {
                (Paths::in_directory(directory), Some(lock(directory)?))
            }
        };
        let absolute =
            |path: &Path| std::path::absolute(path).map_err(|source| failed("find", path, source));
        let paths = Paths {
            data: absolute(&paths.data)?,
            index: absolute(&paths.index)?,
        };
        for directory in paths.directories() {
            let found = fs::metadata(&directory);
            found.map_err(|source| failed("open", &directory, source))?;
            // Flushes and snapshots create and rename files in it, as the daemon's user.
            access(&directory, Access::WRITE_OK | Access::EXEC_OK)
                .map_err(|errno| failed("create files in", &directory, errno.into()))?;
        }
        Ok(Self { paths, automatic })
    }

    /// Returns the paths of the files.
    pub fn paths(&self) -> &Paths {
        &self.paths
    }

    /// Creates the layer above `sources` if it is missing, in a directory of `--upper-auto`.
    pub(super) fn create_if_missing(&self, sources: &OpenSources) -> Result<(), Error> {
        let Self { paths, automatic } = self;
        // The index file is created last, and removed when a snapshot seals the data file. A data file with a
        // header only is the leftover of a process that died in between; it never had data.
        let len = paths.data.metadata().map(|data| data.len());
        let is_there =
            paths.index.exists() || len.as_ref().is_ok_and(|len| *len > HEADER_LEN as u64);
        // The first pair of a disk is gone once its snapshot was deleted.
        let has_snapshots = !Pairs::read(paths).is_ok_and(|pairs| pairs.active() == paths);
        if automatic.is_none() || is_there || has_snapshots {
            return Ok(());
        }
        if len.is_ok() {
            fs::remove_file(&paths.data).map_err(|source| failed("remove", &paths.data, source))?;
        }
        let image = sources.image().map_err(Error::Image)?;
        let size = image.at_own_size().sectors().bytes();
        let header = image
            .header_above(size, Uuid::new_v4())
            .map_err(Error::Image)?;
        writable::create(paths, Kind::Hybrid, &header).map_err(Error::Writable)?;
        log::info!("created the writable layer {}", paths.data.display());
        Ok(())
    }
}

fn failed(what: &'static str, path: &Path, source: io::Error) -> Error {
    let path = path.to_owned();
    Error::Writable(writable::Error::File { what, path, source })
}

/// Locks a directory: a second daemon, started by mistake, must not create or open the layer in it at the
/// same time.
fn lock(directory: &Path) -> Result<File, Error> {
    let opened = open_directory(directory).map_err(|source| failed("open", directory, source))?;
    match lock_within(&opened, LockKind::Exclusive, LOCK_LIMIT) {
        Ok(()) => Ok(opened),
        Err(TryLockError::WouldBlock) => {
            let path = directory.to_owned();
            Err(Error::Writable(writable::Error::Busy { path }))
        }
        Err(TryLockError::Error(source)) => Err(failed("lock", directory, source)),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::thread;

    use super::*;
    use crate::format::lsmt::{Header, HeaderKind};
    use crate::image::config::Stack;
    use crate::writable::{Options, WritableLayer};

    /// An image of 5 sectors and a half that holds nothing.
    fn stack(dir: &Path) -> Stack {
        let header = Header {
            index_offset: HEADER_LEN as u64,
            index_entries: 0,
            virtual_size: 5 * 512 + 100,
            uuid: Uuid::from_u128(7),
            parent_uuid: Uuid::nil(),
            message: Vec::new(),
        };
        let mut bytes = header.encode(HeaderKind::Header).to_vec();
        bytes.extend(header.encode(HeaderKind::Trailer));
        let path = dir.join("layer");
        fs::write(&path, bytes).unwrap();
        Stack::new([path])
    }

    fn open_upper(paths: &Paths) -> Result<WritableLayer, writable::Error> {
        let options = Options::default();
        WritableLayer::open(paths, None, &options)
    }

    fn sources(stack: &Stack) -> OpenSources {
        OpenSources {
            stack: stack.clone(),
            files: stack.open_files().unwrap(),
            client: None,
            trace: None,
        }
    }

    fn find_or_create(directory: &Path, stack: &Stack) -> Paths {
        let source = WritableSource::Directory(directory.to_owned());
        WritableFiles::create_directory(&source).unwrap();
        let files = WritableFiles::find(&source).unwrap();
        files.create_if_missing(&sources(stack)).unwrap();
        files.paths
    }

    #[test]
    fn a_directory_gets_one_layer_and_keeps_it() {
        let dir = tempfile::tempdir().unwrap();
        let (stack, directory) = (stack(dir.path()), dir.path().join("a/b"));
        let paths = find_or_create(&directory, &stack);
        let upper = open_upper(&paths).unwrap();
        assert_eq!(upper.header().virtual_size, 6 * 512);
        assert_eq!(upper.header().parent_uuid, Uuid::from_u128(7));
        let uuid = upper.header().uuid;
        drop(upper);
        assert_eq!(find_or_create(&directory, &stack), paths);
        assert_eq!(open_upper(&paths).unwrap().header().uuid, uuid);
    }

    #[test]
    fn of_two_who_start_at_once_one_has_the_layer() {
        for _ in 0..8 {
            let dir = tempfile::tempdir().unwrap();
            let stack = stack(dir.path());
            let directory = dir.path().join("upper");
            let barrier = Barrier::new(2);
            let start = || {
                barrier.wait();
                let source = WritableSource::Directory(directory.clone());
                WritableFiles::create_directory(&source).unwrap();
                let files = WritableFiles::find(&source).unwrap();
                files.create_if_missing(&sources(&stack)).unwrap();
                (open_upper(&files.paths), files.paths)
            };
            let (one, other) = thread::scope(|scope| {
                let other = scope.spawn(start);
                (start(), other.join().unwrap())
            });
            let (opened, failed) = match one.0.is_ok() {
                true => (one, other.0),
                false => (other, one.0),
            };
            assert!(
                matches!(failed, Err(writable::Error::Busy { .. })),
                "{failed:?}"
            );
            let uuid = opened.0.unwrap().header().uuid;
            assert_eq!(open_upper(&opened.1).unwrap().header().uuid, uuid);
        }
    }

    #[test]
    fn what_is_left_of_making_one_is_made_anew_but_data_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let stack = stack(dir.path());
        let data = dir.path().join("upper.data");
        for len in [0, HEADER_LEN] {
            fs::write(&data, vec![0; len]).unwrap();
            find_or_create(dir.path(), &stack);
            fs::remove_file(dir.path().join("upper.index")).unwrap();
        }
        fs::write(&data, vec![1; HEADER_LEN + 1]).unwrap();
        let paths = find_or_create(dir.path(), &stack);
        assert!(open_upper(&paths).is_err());
        assert_eq!(fs::read(&data).unwrap(), vec![1; HEADER_LEN + 1]);
    }
}
