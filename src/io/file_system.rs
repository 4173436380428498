//! Finds files whose file system may wait for another process.
//!
//! Each call on a file of FUSE or of a network file system may wait for a server without an end, even
//! `fstat(2)` and `close(2)`. No signal ends such a wait. The functions here ask the kernel only for what it
//! has in memory.

use std::fs::File;
use std::io;

use rustix::fs::{AtFlags, FileType, Statx, StatxAttributes, StatxFlags, fcntl_get_seals, statx};

/// Returns the type and the permissions of `file`.
///
/// # Errors
///
/// Those of `statx(2)`.
pub fn mode(file: &File) -> io::Result<u32> {
    Ok(known(file)?.stx_mode.into())
}

/// Returns whether calls on `file` may wait for another process. Calls on shared memory (memfd, tmpfs, hugetlbfs) do
/// not, nor do those on a file system of the kernel's own on a block device. Only calls on regular files reach the
/// file system.
///
/// # Errors
///
/// Those of `statx(2)`.
pub fn may_wait(file: &File) -> io::Result<bool> {
    let found = known(file)?;
    let regular = FileType::from_raw_mode(found.stx_mode.into()) == FileType::RegularFile;
    // Only files of shared memory have seals.
    Ok(regular && !is_on_local_device(&found) && fcntl_get_seals(file).is_err())
}

/// Whether a file lies on a block device without a server between them. FUSE on a block device (`fuseblk`) has the
/// number of that device, but knows none of the attributes of ext4, xfs and their kind.
fn is_on_local_device(found: &Statx) -> bool {
    let of_the_kernel = StatxAttributes::APPEND | StatxAttributes::IMMUTABLE;
    found.stx_dev_major != 0 && found.stx_attributes_mask.contains(of_the_kernel)
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
