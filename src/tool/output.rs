//! Files that appear under their names when they are complete.
//!
//! A file is written without a name (`O_TMPFILE`), or under a temporary name where the file system
//! does not support that. [`Unnamed::publish`] makes it durable and names it. A failure before
//! leaves nothing behind, and does not change an existing file of that name. A kill during the
//! replacement of an existing file leaves the temporary name, `.NAME.PID-N.tmp`.
//!
//! A large file is first written from front to back by an [`Appender`], and otherwise changed after
//! that.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, CWD, MemfdFlags, Mode, OFlags, linkat, memfd_create, openat};

use super::Error;
use super::appender::{Appender, Cache};
use crate::io::directory::{parent_of, sync_parent};

/// A file that has no name yet. Its content is written through [`Unnamed::content`].
#[derive(Debug)]
pub struct Unnamed {
    file: Arc<File>,
    /// A second file without a name, for what does not fit into memory.
    scratch: Arc<File>,
    /// Final path.
    target: PathBuf,
    /// Temporary name, if any.
    temporary: Option<PathBuf>,
}

impl Unnamed {
    /// Creates a file that will appear as `target`, in place of an existing file.
    ///
    /// # Errors
    /// [`Error::NotAFile`]; [`Error::Write`] if the directory cannot be written to.
    pub fn create(target: &Path) -> Result<Self, Error> {
        let target = match fs::canonicalize(target) {
            Ok(existing) if existing.is_file() => existing,
            Ok(existing) => return Err(Error::NotAFile { path: existing }),
            Err(_) => target.to_owned(),
        };
        let (file, scratch) = (nameless(&target), nameless(&target));
        Self::start(target, file, scratch)
    }

    /// Creates the file `target`, which must not exist, under its name: an interrupted command leaves that name and no
    /// temporary one. Content that needs a second file is kept in memory.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn create_named(target: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Write {
            path: target.to_owned(),
            source,
        };
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create_new(true);
        let file = options.open(target).map_err(failed)?;
        let temporary = Some(target.to_owned());
        let scratch = memfd_create("scratch", MemfdFlags::CLOEXEC);
        let scratch = scratch.map_err(|errno| failed(errno.into()))?;
        Ok(Self {
            file: Arc::new(file),
            scratch: Arc::new(scratch.into()),
            target: target.to_owned(),
            temporary,
        })
    }

    /// Takes files without names, or creates them under temporary names.
    fn start(target: PathBuf, file: Option<File>, scratch: Option<File>) -> Result<Self, Error> {
        let failed = |source| Error::Write {
            path: target.clone(),
            source,
        };
        let (file, temporary) = match file {
            Some(file) => (file, None),
            None => {
                let (file, name) = named(&target).map_err(failed)?;
                (file, Some(name))
            }
        };
        let scratch = match scratch {
            Some(scratch) => scratch,
            None => {
                let (scratch, name) = named(&target).map_err(failed)?;
                fs::remove_file(name).map_err(failed)?;
                scratch
            }
        };
        Ok(Self {
            file: Arc::new(file),
            scratch: Arc::new(scratch),
            target,
            temporary,
        })
    }

    /// The content of the file, which this process or a child of it writes.
    pub fn content(&self) -> NewFile {
        NewFile {
            file: Arc::clone(&self.file),
            scratch: Arc::clone(&self.scratch),
            appender: None,
            target: self.target.clone(),
            position: 0,
        }
    }

    /// Makes the file durable, then names it, durably too. Its content is complete.
    ///
    /// # Errors
    /// [`Error::Write`]. The file does not appear, unless only its name could not be made durable.
    pub fn publish(mut self) -> Result<(), Error> {
        self.name_it().map_err(|source| Error::Write {
            path: self.target.clone(),
            source,
        })
    }

    fn name_it(&mut self) -> io::Result<()> {
        self.file.sync_all()?;
        let name = match self.temporary.take() {
            Some(name) => name,
            None => {
                // Linking does not replace an existing name; renaming does.
                let name = temporary_name(&self.target);
                linkat(
                    CWD,
                    own_path(&self.file),
                    CWD,
                    &name,
                    AtFlags::SYMLINK_FOLLOW,
                )?;
                name
            }
        };
        // A failure before the rename removes the temporary name.
        let name = self.temporary.insert(name);
        if *name != self.target {
            fs::rename(name, &self.target)?;
        }
        self.temporary = None;
        sync_parent(&self.target)
    }
}

impl Drop for Unnamed {
    fn drop(&mut self) {
        if let Some(name) = &self.temporary {
            // If this fails, nothing else can be done.
            let _ = fs::remove_file(name);
        }
    }
}

/// The content of a file in progress.
#[derive(Debug)]
pub struct NewFile {
    file: Arc<File>,
    scratch: Arc<File>,
    /// Appends to the file, while the file is not changed otherwise.
    appender: Option<Appender>,
    /// Final path.
    target: PathBuf,
    /// Number of appended bytes.
    position: u64,
}

impl NewFile {
    /// Appends on a thread of its own, until the file is changed otherwise.
    ///
    /// # Errors
    /// [`Error::Threads`].
    pub fn start_appender(&mut self, cache: Cache) -> Result<(), Error> {
        let appender = Appender::start(Arc::clone(&self.file), cache);
        self.appender = Some(appender.map_err(Error::Threads)?);
        Ok(())
    }

    /// An empty file for what does not fit into memory. There is one.
    pub fn scratch(&self) -> NewFile {
        NewFile {
            file: Arc::clone(&self.scratch),
            scratch: Arc::clone(&self.scratch),
            appender: None,
            target: self.target.clone(),
            position: 0,
        }
    }

    /// Final path.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Number of appended bytes.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Appends bytes.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let written = match &mut self.appender {
            Some(appender) => appender.write(bytes),
            None => self.file.write_all_at(bytes, self.position),
        };
        written.map_err(|source| self.failed(source))?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    /// Appends `len` zeros, to be overwritten later.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn skip(&mut self, mut len: u64) -> Result<(), Error> {
        let zeros = [0; 4096];
        while len > 0 {
            let part = len.min(zeros.len() as u64);
            self.write(&zeros[..part as usize])?;
            len -= part;
        }
        Ok(())
    }

    /// Writes bytes at `offset`.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn write_at(&mut self, bytes: &[u8], offset: u64) -> Result<(), Error> {
        self.finish_appends()?;
        let written = self.file.write_all_at(bytes, offset);
        written.map_err(|source| self.failed(source))
    }

    /// Waits until all appended bytes are in the file.
    fn finish_appends(&mut self) -> Result<(), Error> {
        let finished = self.appender.take().map_or(Ok(()), Appender::finish);
        finished.map_err(|source| self.failed(source))
    }

    /// Reads bytes that were written.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn read_at(&mut self, bytes: &mut [u8], offset: u64) -> Result<(), Error> {
        self.finish_appends()?;
        let read = self.file.read_exact_at(bytes, offset);
        read.map_err(|source| self.failed(source))
    }

    /// Moves the bytes from `from` to the end down to `to`.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn move_down(&mut self, from: u64, to: u64) -> Result<(), Error> {
        let mut chunk = vec![0; 1024 * 1024];
        let mut at = from;
        while at < self.position {
            let len = (self.position - at).min(chunk.len() as u64);
            let part = &mut chunk[..len as usize];
            self.read_at(part, at)?;
            self.write_at(part, at - (from - to))?;
            at += len;
        }
        self.position -= from - to;
        self.set_len(self.position)
    }

    /// Sets the length of the file; added bytes are zeros.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn set_len(&mut self, len: u64) -> Result<(), Error> {
        self.finish_appends()?;
        self.file.set_len(len).map_err(|source| self.failed(source))
    }

    /// Waits until all of the content is in the file.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn finish(mut self) -> Result<(), Error> {
        self.finish_appends()
    }

    fn failed(&self, source: io::Error) -> Error {
        Error::Write {
            path: self.target.clone(),
            source,
        }
    }
}

/// Refuses an output that is also an input.
///
/// # Errors
/// [`Error::OutputIsInput`] if `target` is one of `inputs`.
pub fn refuse_inputs(
    target: &Path,
    mut inputs: impl Iterator<Item = Metadata>,
) -> Result<(), Error> {
    let Ok(target_file) = fs::metadata(target) else {
        return Ok(());
    };
    let id = |file: &Metadata| (file.dev(), file.ino());
    if inputs.any(|input| id(&input) == id(&target_file)) {
        let path = target.to_owned();
        return Err(Error::OutputIsInput { path });
    }
    Ok(())
}

/// Creates a file without a name in the directory of `target`, which vanishes with the process.
/// `None`: the file system does not support it, or the file could not be named later.
fn nameless(target: &Path) -> Option<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = openat(CWD, parent_of(target), flags, Mode::from_raw_mode(0o666)).ok()?;
    let file = File::from(file);
    fs::exists(own_path(&file)).unwrap_or(false).then_some(file)
}

/// Creates a file under a temporary name beside `target`.
fn named(target: &Path) -> io::Result<(File, PathBuf)> {
    let name = temporary_name(target);
    let mut options = OpenOptions::new();
    let file = options
        .read(true)
        .write(true)
        .create_new(true)
        .open(&name)?;
    Ok((file, name))
}

/// Path of an open file.
fn own_path(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// A name beside `target` that no other file of this or another process has.
fn temporary_name(target: &Path) -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    let process = std::process::id();
    parent_of(target).join(format!(".{name}.{process}-{number}.tmp"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_whole_or_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("target");
        let start = |named: bool, cache: Option<Cache>| {
            let nameless = || if named { None } else { nameless(&target) };
            let unnamed = Unnamed::start(target.clone(), nameless(), nameless()).unwrap();
            assert_eq!(unnamed.temporary.is_some(), named);
            let mut file = unnamed.content();
            if let Some(cache) = cache {
                file.start_appender(cache).unwrap();
            }
            let mut scratch = file.scratch();
            scratch.write(b"scratch").unwrap();
            scratch.finish().unwrap();
            file.write(b"0123456789").unwrap();
            file.skip(2).unwrap();
            file.write(b"abc").unwrap();
            file.write_at(b"X", 1).unwrap();
            (unnamed, file)
        };
        let files = || fs::read_dir(dir.path()).unwrap().count();
        let mut existed = 0;
        for (named, cache) in [
            (true, None),
            (false, None),
            (true, Some(Cache::Past)),
            (false, Some(Cache::Past)),
            (false, Some(Cache::Through)),
        ] {
            assert_eq!(files(), existed);
            let given_up = start(named, cache);
            assert_eq!(files(), existed + usize::from(named));
            drop(given_up);
            assert_eq!(files(), existed, "a file given up leaves nothing");
            let (unnamed, mut file) = start(named, cache);
            file.move_down(8, 5).unwrap();
            file.write(b"end").unwrap();
            file.finish().unwrap();
            unnamed.publish().unwrap();
            existed = 1;
            assert_eq!(files(), existed);
            assert_eq!(fs::read(&target).unwrap(), b"0X23489\0\0abcend");
            fs::write(&target, b"old").unwrap();
        }
    }
}
