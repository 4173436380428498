//! The listening socket of a disk.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use super::super::entry::Entry;
use super::super::error::{Code, Error, Failure};

/// Binds the socket of a disk, with the permissions and the owner of its specification. A socket that no process listens
/// on is replaced.
///
/// # Errors
/// [`Code::InUse`] if a process listens there, or another kind of file is at the path; [`Code::BadRequest`] if the
/// request names a path or an owner that cannot be used.
pub fn bind(entry: &Entry) -> Result<UnixListener, Failure> {
    let path = &entry.socket;
    let named = entry.spec.socket.is_some();
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
    // Under another name until its mode and its owner are right.
    let hidden = hidden(path);
    let _ = fs::remove_file(&hidden);
    let listener = UnixListener::bind(&hidden);
    let listener = listener.map_err(|error| failure("bind", path, named, error))?;
    let done = protect(entry, &hidden).and_then(|()| {
        fs::rename(&hidden, path).map_err(|error| failure("bind", path, named, error))
    });
    if let Err(failure) = done {
        // The error that is reported matters more than this one.
        let _ = fs::remove_file(&hidden);
        return Err(failure);
    }
    Ok(listener)
}

/// Gives the socket at `hidden` its owner and its permissions, in this order: the owner of before must not lose it first.
fn protect(entry: &Entry, hidden: &Path) -> Result<(), Failure> {
    let path = &entry.socket;
    let mode = entry.spec.socket_mode.unwrap_or_default();
    if let Some(owner) = &entry.spec.socket_owner {
        let (user, group) = owner
            .numbers()
            .map_err(|error| Failure::caused(Code::BadRequest, &error))?;
        chown(hidden, user, group).map_err(|error| {
            let text = format!(
                "cannot give the socket {} to {owner}: {error}; name a group of the node's user, or run the node as root",
                path.display()
            );
            Failure::new(Code::BadRequest, text)
        })?;
    }
    let permissions = fs::Permissions::from_mode(mode.bits());
    fs::set_permissions(hidden, permissions)
        .map_err(|error| Error::file("protect", path)(error).into())
}

/// The failure of a step. A path that the request names is the client's to choose.
fn failure(what: &'static str, path: &Path, named: bool, error: io::Error) -> Failure {
    let mut failure = Failure::from(Error::file(what, path)(error));
    if named && failure.code == Code::Internal {
        failure.code = Code::BadRequest;
    }
    failure
}

/// Name of a socket until its mode is right.
pub(super) fn hidden(socket: &Path) -> PathBuf {
    socket.with_extension("new")
}
