//! Opening of files that a user names.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;

/// Opens a regular file, and never waits for the other end of a pipe that may be there instead.
///
/// # Errors
/// The system refuses, or the path names another kind of file.
pub fn open_regular(path: &Path, mut options: OpenOptions) -> io::Result<File> {
    let wrong = || io::Error::new(io::ErrorKind::InvalidInput, "not a regular file");
    let opened = options
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path);
    let file = match opened {
        // A socket, or a pipe that no process reads.
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => return Err(wrong()),
        opened => opened?,
    };
    if !file.metadata()?.is_file() {
        return Err(wrong());
    }
    rustix::fs::fcntl_setfl(&file, OFlags::empty())?;
    Ok(file)
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
        let file = folder.path().join("file");
        open_regular(&file, write).unwrap();
        open_regular(&file, read).unwrap();
    }
}
