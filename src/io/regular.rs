//! Opens files by paths that may name another kind of file.
//!
//! `open(2)` of a pipe waits for the other end. Therefore the functions here open each path that a user
//! names, or at which another process may create a file.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;

/// Opens a regular file. Never waits for the other end of a pipe.
///
/// # Errors
/// That of `open(2)`; [`InvalidInput`](io::ErrorKind::InvalidInput) if the path names another kind of file.
pub fn open_regular(path: &Path, mut options: OpenOptions) -> io::Result<File> {
    let wrong = || io::Error::new(io::ErrorKind::InvalidInput, "not a regular file");
    let opened = options
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path);
    let file = match opened {
        // A socket, or a pipe without a reader.
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => return Err(wrong()),
        opened => opened?,
    };
    if !file.metadata()?.is_file() {
        return Err(wrong());
    }
    rustix::fs::fcntl_setfl(&file, OFlags::empty())?;
    Ok(file)
}

/// Opens a regular file for reading.
///
/// # Errors
/// Those of [`open_regular`].
pub fn open_to_read(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.read(true);
    open_regular(path, options)
}

/// Creates a regular file for writing, or truncates the one at `path`.
///
/// # Errors
/// Those of [`open_regular`].
pub fn create_regular(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.write(true).create(true).truncate(true);
    open_regular(path, options)
}

/// Reads a regular file of at most `limit` bytes.
///
/// # Errors
/// Those of [`open_regular`] and of reading; [`InvalidData`](io::ErrorKind::InvalidData) if the file is
/// longer.
pub fn read_regular(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = open_to_read(path)?;
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
    match bytes.len() as u64 > limit {
        true => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("longer than {limit} bytes"),
        )),
        false => Ok(bytes),
    }
}

/// Opens a directory.
///
/// # Errors
/// That of `open(2)`, which includes that the path names something else.
pub fn open_directory(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).custom_flags(libc::O_DIRECTORY);
    options.open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipe_is_refused_and_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pipe");
        let mode = rustix::fs::Mode::RWXU;
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, mode).unwrap();
        let mut read = File::options();
        read.read(true);
        let error = open_regular(&path, read.clone()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        let mut write = File::options();
        write.write(true).create(true);
        assert!(open_regular(&path, write.clone()).is_err());
        assert!(create_regular(&path).is_err());
        assert!(read_regular(&path, 1).is_err());
        assert!(open_directory(&path).is_err());
        let file = folder.path().join("file");
        open_regular(&file, write).unwrap();
        open_regular(&file, read).unwrap();
        std::fs::write(&file, "12").unwrap();
        assert_eq!(read_regular(&file, 2).unwrap(), b"12");
        assert!(read_regular(&file, 1).is_err());
        drop(create_regular(&file).unwrap());
        assert_eq!(read_regular(&file, 1).unwrap(), b"");
        open_directory(folder.path()).unwrap();
    }
}
