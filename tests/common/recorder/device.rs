//! A mount of FUSE on a block device (`fuseblk`).

use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use rustix::io::Errno;
use rustix::mount::{self, MountFlags, UnmountFlags};

/// Loop devices that are tried: other programs may use some of them.
const DEVICES: u32 = 8;

/// Mounts on `folder`; returns the server's end.
pub(super) fn mount(folder: &Path) -> Result<OwnedFd, Errno> {
    let server = File::options().read(true).write(true).open("/dev/fuse");
    let server = server.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    let data = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,blksize=512",
        server.as_raw_fd()
    );
    let data = CString::new(data).expect("text without zeros");
    let mut mounted = Err(Errno::NODEV);
    for number in (0..DEVICES).rev() {
        let device = format!("/dev/loop{number}");
        mounted = mount::mount(device, folder, "fuseblk", MountFlags::NODEV, &*data);
        if mounted != Err(Errno::BUSY) {
            break;
        }
    }
    mounted.map(|()| server.into())
}

/// Ends the mount, also while files are open.
pub(super) fn unmount(folder: &Path) {
    mount::unmount(folder, UnmountFlags::DETACH).expect("unmount");
}
