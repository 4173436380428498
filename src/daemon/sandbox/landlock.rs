//! Landlock: forbids access to all paths and ports except the directories of sockets and writable layers.
//!
//! Landlock checks the object of an access and not the system call. So it also applies to operations of
//! io_uring, which seccomp cannot filter. Open files stay usable.

use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd,
    Ruleset, RulesetAttr, RulesetCreatedAttr, Scope,
};

use super::{Error, Reach};
use crate::io::confine::{self, Support};

/// Newest set of rights that are restricted; an older kernel restricts those it knows.
const NEWEST: ABI = ABI::V10;

/// Forbids access to files, the network, abstract sockets and other processes, except for the paths in `reach`.
///
/// The rules apply to the calling thread and the threads that it starts.
///
/// # Errors
///
/// The kernel has Landlock and refuses the rules; or a path of `reach` cannot be opened.
pub fn close(reach: &Reach<'_>) -> Result<Support, Error> {
    if confine::landlock::is_forbidden() {
        return Ok(Support::Forbidden);
    }
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?;
    let socket = AccessFs::MakeSock | AccessFs::RemoveFile;
    let content = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate;
    // Directories are read to make the names in them durable.
    let directory = content | AccessFs::MakeReg | AccessFs::RemoveFile | AccessFs::ReadDir;
    let allowed = [
        (reach.sockets, socket),
        (reach.directories, directory),
        (reach.files, content),
        (reach.readable, AccessFs::ReadFile.into()),
    ];
    for (paths, rights) in allowed {
        for path in paths {
            rules = rules.add_rule(rule(path, rights)?)?;
        }
    }
    Ok(rules.restrict_self()?.landlock.into())
}

fn rule(path: &Path, rights: BitFlags<AccessFs>) -> Result<PathBeneath<PathFd>, Error> {
    Ok(PathBeneath::new(PathFd::new(path)?, rights))
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::{self, Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::thread;

    use super::*;

    #[test]
    fn only_what_is_open_and_the_socket_are_within_reach() {
        let (own, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (socket, file) = (own.path().join("socket"), other.path().join("file"));
        fs::write(&socket, "").unwrap();
        fs::write(&file, "content").unwrap();
        let mut open = File::options().read(true).write(true).open(&file).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        // In a thread of its own, which the rules hold for.
        let inside = move || {
            let reach = Reach {
                sockets: &[own.path().to_owned()],
                ..Reach::default()
            };
            let support = close(&reach).unwrap();
            let denied = |result: io::Result<()>| {
                let error = result.err().map(|error| error.kind());
                match support {
                    Support::Full => error == Some(io::ErrorKind::PermissionDenied),
                    _ => error.is_none(),
                }
            };
            assert!(denied(File::open(&socket).map(drop)), "open, here");
            assert!(denied(File::open(&file).map(drop)), "open, elsewhere");
            assert!(denied(fs::read_dir("/").map(drop)), "list");
            assert!(
                denied(File::create(own.path().join("new")).map(drop)),
                "create"
            );
            assert!(denied(fs::remove_file(&file)), "remove, elsewhere");
            // Kernels before 6.7 leave the network to seccomp.
            if let Err(error) = TcpStream::connect(address) {
                assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
            }
            fs::remove_file(&socket).unwrap();
            let mut text = String::new();
            open.read_to_string(&mut text).unwrap();
            assert_eq!(text, "content");
            open.write_all(b"more").unwrap();
        };
        thread::spawn(inside).join().unwrap();
    }

    #[test]
    fn the_files_of_a_writable_layer_can_be_replaced_and_no_others() {
        let (upper, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (index, file) = (upper.path().join("index"), other.path().join("file"));
        let linked = tempfile::NamedTempFile::new().unwrap();
        fs::write(&index, "old").unwrap();
        fs::write(&file, "content").unwrap();
        let inside = move || {
            let reach = Reach {
                directories: &[upper.path().to_owned()],
                files: &[linked.path().to_owned()],
                ..Reach::default()
            };
            let support = close(&reach).unwrap();
            File::options().write(true).open(linked.path()).unwrap();
            let new = upper.path().join("index.new");
            fs::write(&new, "new").unwrap();
            fs::rename(&new, &index).unwrap();
            File::open(upper.path()).unwrap().sync_all().unwrap();
            assert_eq!(fs::read(&index).unwrap(), b"new");
            if support == Support::Full {
                assert!(File::open(&file).is_err(), "open, elsewhere");
                assert!(fs::write(other.path().join("new"), "").is_err());
                assert!(fs::rename(&index, other.path().join("moved")).is_err());
                assert!(fs::create_dir(upper.path().join("folder")).is_err());
            }
        };
        thread::spawn(inside).join().unwrap();
    }
}
