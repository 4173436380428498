//! Files whose file system may wait for another process.
//!
//! Each call on a file of FUSE, or of a network file system, may wait for a server without an end: also
//! `fstat(2)` and `close(2)`. No signal ends such a wait. The functions here ask the kernel only for what it
//! has in memory.

use std::fs::File;
use std::io;

use rustix::fs::{AtFlags, FileType, Statx, StatxFlags, fcntl_get_seals, statx};

/// The type of `file`, and its permissions.
///
/// # Errors
///
/// The system refuses.
pub fn mode(file: &File) -> io::Result<u32> {
    Ok(known(file)?.stx_mode.into())
}

/// Whether calls on `file` may wait for another process. Not those on shared memory (memfd, tmpfs, hugetlbfs),
/// nor those on a file system that lies on a block device. Only calls on regular files reach the file
/// system.
///
/// # Errors
///
/// The system refuses.
pub fn may_wait(file: &File) -> io::Result<bool> {
    let found = known(file)?;
    let regular = FileType::from_raw_mode(found.stx_mode.into()) == FileType::RegularFile;
    // Only files of shared memory have seals.
    Ok(regular && found.stx_dev_major == 0 && fcntl_get_seals(file).is_err())
}

fn known(file: &File) -> io::Result<Statx> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    Ok(statx(file, c"", flags, StatxFlags::TYPE)?)
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    #[test]
    fn shared_memory_does_not_wait_and_a_virtual_file_system_may() {
        let memory = memfd_create("memory", MemfdFlags::CLOEXEC).unwrap();
        let (pipe, _writer) = io::pipe().unwrap();
        let shm = tempfile::tempfile_in("/dev/shm").unwrap();
        for file in [File::from(memory), File::from(OwnedFd::from(pipe)), shm] {
            assert!(!may_wait(&file).unwrap(), "{file:?}");
        }
        let procfs = File::open("/proc/self/maps").unwrap();
        assert!(may_wait(&procfs).unwrap());
        assert_eq!(mode(&procfs).unwrap() & libc::S_IFMT, libc::S_IFREG);
    }
}
