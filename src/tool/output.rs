//! A file that appears under its name only when it is whole.
//!
//! It is written without a name, or under a temporary one where the file system knows no files
//! without; [`NewFile::publish`] makes it durable and gives it its name. Until then a failure leaves
//! nothing behind, and what had the name before is as it was. (Killed in the moment in which it takes
//! another file's place, it leaves the temporary name, which starts with a point and ends with `.tmp`.)
//!
//! A large file is written from front to back by an [`Appender`]; whatever else is done to it comes
//! after that.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat, openat};

use super::Error;
use super::appender::{Appender, Cache};
use crate::io::directory::{parent_of, sync_parent};

/// A file under way.
#[derive(Debug)]
pub struct NewFile {
    file: Arc<File>,
    /// Takes what is written one after the other, while nothing else is done to the file.
    appender: Option<Appender>,
    /// Where it is to appear.
    target: PathBuf,
    /// Temporary name, while it has one.
    temporary: Option<PathBuf>,
    /// Bytes written one after the other.
    position: u64,
}

impl NewFile {
    /// Starts a file that is to appear as `target`, in place of a file there.
    ///
    /// # Errors
    /// `target` is something other than a file, or its folder cannot be written to.
    pub fn create(target: &Path) -> Result<Self, Error> {
        let target = match fs::canonicalize(target) {
            Ok(existing) if existing.is_file() => existing,
            Ok(existing) => return Err(Error::NotAFile { path: existing }),
            Err(_) => target.to_owned(),
        };
        let nameless = nameless(&target);
        Self::start(target, nameless)
    }

    /// Starts a large file, of which most is written one after the other.
    ///
    /// # Errors
    /// As [`NewFile::create`], and there is no thread.
    pub fn append(target: &Path, cache: Cache) -> Result<Self, Error> {
        let mut new = Self::create(target)?;
        let appender = Appender::start(Arc::clone(&new.file), cache);
        new.appender = Some(appender.map_err(Error::Threads)?);
        Ok(new)
    }

    /// Goes on with a file without a name, or starts one with a temporary name.
    fn start(target: PathBuf, nameless: Option<File>) -> Result<Self, Error> {
        let (file, temporary) = match nameless {
            Some(file) => (file, None),
            None => {
                let name = temporary_name(&target);
                let mut options = OpenOptions::new();
                let file = options.read(true).write(true).create_new(true).open(&name);
                let file = file.map_err(|source| Error::Write {
                    path: target.clone(),
                    source,
                })?;
                (file, Some(name))
            }
        };
        Ok(Self {
            file: Arc::new(file),
            appender: None,
            target,
            temporary,
            position: 0,
        })
    }

    /// Where the file is to appear.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Bytes written one after the other so far.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Writes bytes after those written before.
    ///
    /// # Errors
    /// The system fails to.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let written = match &mut self.appender {
            Some(appender) => appender.write(bytes),
            None => self.file.write_all_at(bytes, self.position),
        };
        written.map_err(|source| self.failed(source))?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    /// Leaves the next `len` bytes for later; they are zeros until written.
    ///
    /// # Errors
    /// The system fails to write.
    pub fn skip(&mut self, mut len: u64) -> Result<(), Error> {
        let zeros = [0; 4096];
        while len > 0 {
            let part = len.min(zeros.len() as u64);
            self.write(&zeros[..part as usize])?;
            len -= part;
        }
        Ok(())
    }

    /// Writes bytes at a place of their own.
    ///
    /// # Errors
    /// The system fails to.
    pub fn write_at(&mut self, bytes: &[u8], offset: u64) -> Result<(), Error> {
        self.settle()?;
        let written = self.file.write_all_at(bytes, offset);
        written.map_err(|source| self.failed(source))
    }

    /// Lets all that was appended be in the file.
    fn settle(&mut self) -> Result<(), Error> {
        let settled = self.appender.take().map_or(Ok(()), Appender::finish);
        settled.map_err(|source| self.failed(source))
    }

    /// Reads back what was written.
    ///
    /// # Errors
    /// The system fails to.
    pub fn read_at(&mut self, bytes: &mut [u8], offset: u64) -> Result<(), Error> {
        self.settle()?;
        let read = self.file.read_exact_at(bytes, offset);
        read.map_err(|source| self.failed(source))
    }

    /// Moves everything from byte `from` on down to byte `to`.
    ///
    /// # Errors
    /// The system fails to.
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

    /// Makes the file this long, with zeros if it was shorter.
    ///
    /// # Errors
    /// The system fails to.
    pub fn set_len(&mut self, len: u64) -> Result<(), Error> {
        self.settle()?;
        self.file.set_len(len).map_err(|source| self.failed(source))
    }

    /// Makes the file durable and lets it appear under its name, durably too.
    ///
    /// # Errors
    /// The system fails to; unless it failed to make the name durable, the file does not appear.
    pub fn publish(mut self) -> Result<(), Error> {
        self.settle()?;
        let result = self.name_it();
        result.map_err(|source| self.failed(source))
    }

    fn name_it(&mut self) -> io::Result<()> {
        self.file.sync_all()?;
        let name = match self.temporary.take() {
            Some(name) => name,
            None => {
                // Linking does not replace what has the name, renaming does.
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
        // Until it is renamed, the temporary name is removed on any failure.
        let name = self.temporary.insert(name);
        fs::rename(name, &self.target)?;
        self.temporary = None;
        sync_parent(&self.target)
    }

    fn failed(&self, source: io::Error) -> Error {
        Error::Write {
            path: self.target.clone(),
            source,
        }
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(name) = &self.temporary {
            // There is nothing left to do if even this fails.
            let _ = fs::remove_file(name);
        }
    }
}

/// Refuses to put a file in the place of one that is read from.
///
/// # Errors
/// `target` is one of `inputs`.
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

/// A file without a name in the folder of `target`; it vanishes however the process ends. `None`:
/// the file system has none such, or it could not be given a name later.
fn nameless(target: &Path) -> Option<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = openat(CWD, parent_of(target), flags, Mode::from_raw_mode(0o666)).ok()?;
    let file = File::from(file);
    fs::exists(own_path(&file)).unwrap_or(false).then_some(file)
}

/// The path by which a process reaches a file it has open.
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
            let nameless = if named { None } else { nameless(&target) };
            let mut file = NewFile::start(target.clone(), nameless).unwrap();
            assert_eq!(file.temporary.is_some(), named);
            let appender = cache.map(|cache| Appender::start(Arc::clone(&file.file), cache));
            file.appender = appender.transpose().unwrap();
            file.write(b"0123456789").unwrap();
            file.skip(2).unwrap();
            file.write(b"abc").unwrap();
            file.write_at(b"X", 1).unwrap();
            file
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
            let file = start(named, cache);
            assert_eq!(files(), existed + usize::from(named));
            drop(file);
            assert_eq!(files(), existed, "a file given up leaves nothing");
            let mut file = start(named, cache);
            file.move_down(8, 5).unwrap();
            file.write(b"end").unwrap();
            file.publish().unwrap();
            existed = 1;
            assert_eq!(files(), existed);
            assert_eq!(fs::read(&target).unwrap(), b"0X23489\0\0abcend");
            fs::write(&target, b"old").unwrap();
        }
    }
}
