//! The listening socket of a disk.

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use super::super::entry::Entry;
use super::super::error::{Code, Error, Failure};
use super::super::socket::{self, BindError};

/// Binds the socket of a disk, with the mode and the owner of its specification. A socket that no process listens on is
/// replaced.
///
/// # Errors
/// [`Code::InUse`] if a process listens there, or another kind of file is at the path; [`Code::BadRequest`] if the
/// request names a path or an owner that cannot be used.
pub fn bind(entry: &Entry) -> Result<UnixListener, Failure> {
    let path = &entry.socket;
    let spec = &entry.spec;
    let named = spec.socket.is_some();
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Ok(found) if found.file_type().is_socket() && UnixStream::connect(path).is_err() => {
            fs::remove_file(path).map_err(|error| failure("remove", path, named, error))?;
        }
        Ok(_) => {
            let text = format!("{} is in use; choose another socket", path.display());
            return Err(Failure::new(Code::InUse, text));
        }
        Err(error) => return Err(failure("look at", path, named, error)),
    }
    let mode = spec.socket_mode.unwrap_or_default();
    let bound = socket::bind(path, mode, spec.socket_owner.as_ref());
    bound.map_err(|error| match error {
        BindError::Socket(error) => failure("bind", path, named, error),
        error => Failure::caused(Code::BadRequest, &error),
    })
}

/// The failure of a step. A path that the request names is the client's to choose.
fn failure(what: &'static str, path: &Path, named: bool, error: io::Error) -> Failure {
    let mut failure = Failure::from(Error::file(what, path)(error));
    if named && failure.code == Code::Internal {
        failure.code = Code::BadRequest;
    }
    failure
}
