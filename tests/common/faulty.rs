//! A file system of one file that misbehaves on demand: reads that fail, and reads that take as
//! long as the test likes.

use std::ffi::OsStr;
use std::mem;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant, UNIX_EPOCH};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEntry,
    ReplyOpen, Request,
};
use tempfile::TempDir;

use super::PATIENCE;

/// Nothing but page contents is remembered by the kernel.
const TTL: Duration = Duration::ZERO;
const FILE: INodeNo = INodeNo(2);
const NAME: &str = "layer.obd";

/// What is wrong with the file at the moment.
#[derive(Default)]
struct Faults {
    failing: Vec<Range<u64>>,
    holding: Vec<Range<u64>>,
    held: Vec<(Range<u64>, ReplyData)>,
}

struct OneFile {
    content: Arc<Vec<u8>>,
    faults: Arc<Mutex<Faults>>,
}

/// The mounted file system; unmounted when dropped.
pub struct Faulty {
    // Before the folder it is mounted on.
    session: Option<BackgroundSession>,
    folder: TempDir,
    content: Arc<Vec<u8>>,
    faults: Arc<Mutex<Faults>>,
}

fn overlaps(ranges: &[Range<u64>], with: &Range<u64>) -> bool {
    let overlap = |range: &Range<u64>| range.start < with.end && with.start < range.end;
    ranges.iter().any(overlap)
}

fn bytes(content: &[u8], range: &Range<u64>) -> Vec<u8> {
    let end = (range.end as usize).min(content.len());
    content[(range.start as usize).min(end)..end].to_vec()
}

impl OneFile {
    fn attributes(&self, ino: INodeNo) -> FileAttr {
        let (kind, size) = match ino {
            FILE => (FileType::RegularFile, self.content.len() as u64),
            _ => (FileType::Directory, 0),
        };
        FileAttr {
            ino,
            size,
            blocks: size.div_ceil(512),
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm: 0o755,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Filesystem for OneFile {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == NAME {
            reply.entry(&TTL, &self.attributes(FILE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.attributes(ino));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let range = offset..offset + u64::from(size);
        let mut faults = self.faults.lock().expect("faults");
        if overlaps(&faults.failing, &range) {
            reply.error(Errno::EIO);
        } else if overlaps(&faults.holding, &range) {
            faults.held.push((range, reply));
        } else {
            reply.data(&bytes(&self.content, &range));
        }
    }
}

impl Faulty {
    /// Mounts a file system whose one file holds `content`.
    pub fn mount(content: Vec<u8>) -> Self {
        let folder = tempfile::tempdir().expect("temporary directory");
        let (content, faults) = (Arc::new(content), Arc::<Mutex<Faults>>::default());
        let files = OneFile {
            content: Arc::clone(&content),
            faults: Arc::clone(&faults),
        };
        let mut config = Config::default();
        config.mount_options = vec![MountOption::RO, MountOption::FSName("faulty".into())];
        let session = fuser::spawn_mount(files, folder.path(), &config)
            .expect("a FUSE mount: it needs /dev/fuse, and root or fusermount3");
        Self {
            session: Some(session),
            folder,
            content,
            faults,
        }
    }

    /// Path of the file.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join(NAME)
    }

    /// Reads that touch `range` fail from now on.
    pub fn fail(&self, range: Range<u64>) {
        self.faults.lock().expect("faults").failing.push(range);
    }

    /// Reads that touch `range` are not answered from now on.
    pub fn hold(&self, range: Range<u64>) {
        self.faults.lock().expect("faults").holding.push(range);
    }

    /// Waits until a read is being held.
    pub fn wait_until_held(&self) {
        let start = Instant::now();
        while self.faults.lock().expect("faults").held.is_empty() {
            assert!(start.elapsed() < PATIENCE, "nobody reads what is held");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Answers all that was held, and mends the file.
    pub fn heal(&self) {
        let mut faults = self.faults.lock().expect("faults");
        faults.failing.clear();
        faults.holding.clear();
        for (range, reply) in mem::take(&mut faults.held) {
            reply.data(&bytes(&self.content, &range));
        }
    }
}

impl Drop for Faulty {
    fn drop(&mut self) {
        self.heal();
        drop(self.session.take());
    }
}
