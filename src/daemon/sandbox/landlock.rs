//! Landlock: no file can be opened, no port bound or connected to, but for the files of a writable
//! layer.
//!
//! Landlock judges what is reached for, not by which system call, so that it holds as well for what
//! goes through io_uring, where seccomp does not look. What is open already stays usable.

use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, LandlockStatus,
    PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr, Scope,
};

use super::{Error, Support};

/// The newest set of rights to take away; an older kernel takes those it knows.
const NEWEST: ABI = ABI::V10;

/// Takes away all access to files, the network, abstract sockets and other processes. Files in
/// `removable` can still be removed, and files in `changeable` opened, made, renamed and removed.
///
/// It holds for the calling thread and those it starts.
///
/// # Errors
///
/// The kernel has Landlock, but refuses the rules; or a directory cannot be opened.
pub fn close(removable: &[&Path], changeable: &[PathBuf]) -> Result<Support, Error> {
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?;
    for directory in removable {
        let right: BitFlags<AccessFs> = AccessFs::RemoveFile.into();
        rules = rules.add_rule(PathBeneath::new(PathFd::new(directory)?, right))?;
    }
    let change = AccessFs::ReadFile
        | AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::MakeReg
        | AccessFs::RemoveFile
        | AccessFs::ReadDir; // to make names last
    for directory in changeable {
        rules = rules.add_rule(PathBeneath::new(PathFd::new(directory)?, change))?;
    }
    Ok(match rules.restrict_self()?.landlock {
        LandlockStatus::Available { .. } => Support::Full,
        LandlockStatus::NotEnabled | LandlockStatus::NotImplemented => Support::Missing,
    })
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
        // In a thread of its own, for it holds for that.
        let inside = move || {
            let support = close(&[own.path()], &[]).unwrap();
            let denied = |result: io::Result<()>| {
                let error = result.err().map(|error| error.kind());
                match support {
                    Support::Full => error == Some(io::ErrorKind::PermissionDenied),
                    Support::Missing => error.is_none(),
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
        fs::write(&index, "old").unwrap();
        fs::write(&file, "content").unwrap();
        let inside = move || {
            let directories = [upper.path().to_owned()];
            let support = close(&[], &directories).unwrap();
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
