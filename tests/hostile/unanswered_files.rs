//! Files of a FUSE file system whose server does not answer, in place of guest memory, an in-flight area or a
//! log. They are refused without a call that waits; to close one waits, and holds nothing up.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use common::disk::Disk;
use common::raw::{NEED_REPLY, Raw};
use common::recorder::attributes;
use fuser::{
    Config, FileHandle, Filesystem, FopenFlags, Generation, INodeNo, LockOwner, MountOption,
    OpenFlags, ReplyAttr, ReplyEmpty, ReplyEntry, ReplyOpen, Request, Session, SessionACL,
};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use vhost::vhost_user::message::FrontendReq;

const SIZE: u64 = 16 << 20;
const TTL: Duration = Duration::ZERO;

/// Calls that are not answered, until they are taken out.
#[derive(Default)]
struct Unanswered {
    /// Whether calls are no longer answered.
    silent: bool,
    attributes: Vec<(INodeNo, ReplyAttr)>,
    flushes: Vec<ReplyEmpty>,
}

impl Unanswered {
    /// Answers all calls, and those to come.
    fn answer(&mut self) {
        self.silent = false;
        for (ino, reply) in self.attributes.drain(..) {
            reply.attr(&TTL, &attributes(ino, SIZE));
        }
        self.flushes.drain(..).for_each(ReplyEmpty::ok);
    }
}

/// The server does not answer before this is dropped: also when the test fails, or the daemon could not be ended.
struct Silence<'a>(&'a Mutex<Unanswered>);

impl<'a> Silence<'a> {
    fn begin(unanswered: &'a Mutex<Unanswered>) -> Self {
        unanswered.lock().expect("lock").silent = true;
        Self(unanswered)
    }
}

impl Drop for Silence<'_> {
    fn drop(&mut self) {
        let unanswered = self.0.lock();
        unanswered.unwrap_or_else(PoisonError::into_inner).answer();
    }
}

/// A file system with one file, whatever its name.
struct Server(Arc<Mutex<Unanswered>>);

impl Filesystem for Server {
    fn lookup(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEntry) {
        reply.entry(&TTL, &attributes(INodeNo(2), SIZE), Generation(0));
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let mut unanswered = self.0.lock().expect("lock");
        match unanswered.silent {
            true => unanswered.attributes.push((ino, reply)),
            false => reply.attr(&TTL, &attributes(ino, SIZE)),
        }
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::empty());
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        let mut unanswered = self.0.lock().expect("lock");
        match unanswered.silent {
            true => unanswered.flushes.push(reply),
            false => reply.ok(),
        }
    }
}

fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_le_bytes()).collect()
}

#[test]
fn files_whose_server_does_not_answer_hold_nothing_up() {
    let folder = tempfile::tempdir().expect("temporary directory");
    let unanswered = Arc::new(Mutex::new(Unanswered::default()));
    let mut config = Config::default();
    config.mount_options = vec![MountOption::FSName("unanswered".into())];
    let session = fuser::spawn_mount(Server(unanswered.clone()), folder.path(), &config)
        .expect("a FUSE mount: it needs /dev/fuse, and root or fusermount3");
    assert_refused(folder.path(), &unanswered);
    drop(session);
}

/// FUSE on a block device (`fuseblk`) has the number of the device, as ext4 has.
#[test]
fn files_of_fuse_on_a_block_device_are_no_others() {
    if !rustix::process::geteuid().is_root() {
        let error = mount_on_device(Path::new("/tmp")).expect_err("a mount without root");
        assert!(matches!(error, Errno::PERM | Errno::ACCESS), "{error}");
        return;
    }
    let folder = tempfile::tempdir().expect("temporary directory");
    let unanswered = Arc::new(Mutex::new(Unanswered::default()));
    let server = mount_on_device(folder.path()).expect("a mount of type fuseblk");
    let (server, acl) = (OwnedFd::from(server), SessionACL::All);
    let session = Session::from_fd(Server(unanswered.clone()), server, acl, Config::default());
    let session = session.and_then(Session::spawn).expect("a session");
    assert_refused(folder.path(), &unanswered);
    unmount(folder.path(), UnmountFlags::DETACH).expect("unmount");
    drop(session);
}

/// Mounts FUSE on a block device, whose content is never used. Returns the server's end.
fn mount_on_device(folder: &Path) -> Result<File, Errno> {
    let server = File::options().read(true).write(true).open("/dev/fuse");
    let server = server.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    let data = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,blksize=512",
        server.as_raw_fd()
    );
    let data = CString::new(data).expect("text without zeros");
    // Others may use some of the devices.
    let mut mounted = Err(Errno::NODEV);
    for number in (0..8).rev() {
        let device = format!("/dev/loop{number}");
        mounted = mount(device, folder, "fuseblk", MountFlags::NODEV, &*data);
        if mounted != Err(Errno::BUSY) {
            break;
        }
    }
    mounted.map(|()| server)
}

/// Checks that the daemon refuses a file of the file system on `folder` in each place, without a call that waits.
fn assert_refused(folder: &Path, unanswered: &Mutex<Unanswered>) {
    let mut options = File::options();
    let file = options.read(true).write(true).open(folder.join("f"));
    let file = file.expect("file");
    let fds = [file.as_raw_fd()];

    let mut disk = Disk::serve();
    let silence = Silence::begin(unanswered);
    let region = longs(&[0, 1 << 32, SIZE, 0x7100_0000_0000, 0]);
    let table = [&longs(&[1])[..], &region[8..]].concat();
    let inflight = [&longs(&[4096, 0])[..], &[1, 0, 128, 0, 0, 0, 0, 0]].concat();
    for (request, body) in [
        (FrontendReq::ADD_MEM_REG, &region),
        (FrontendReq::SET_MEM_TABLE, &table),
        (FrontendReq::SET_LOG_BASE, &longs(&[4096, 0])),
        (FrontendReq::SET_INFLIGHT_FD, &inflight),
        // No descriptor belongs to it.
        (FrontendReq::SET_FEATURES, &longs(&[0])),
    ] {
        let mut raw = Raw::new(disk.daemon.connect());
        assert!(raw.send(request, NEED_REPLY, body, &fds));
        assert_ne!(raw.receive().expect("answer").number(), 0, "{request:?}");
        // This connection goes on, too.
        raw.ask(FrontendReq::GET_FEATURES, 0, &[])
            .expect("features");
        disk.assert_well();
    }
    assert!(disk.daemon.log().contains("FUSE, network"));

    drop(silence);
    let status = disk.daemon.terminate();
    assert_eq!(status.code(), Some(0), "{}", disk.daemon.log());
}
