//! A file system in memory that records what is done to it, tells what a crash at any moment may
//! leave, and fails on demand.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    BackgroundSession, BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem,
    FopenFlags, Generation, INodeNo, LockOwner, MountOption, OpenFlags, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request, TimeOrNow,
    WriteFlags,
};
use tempfile::TempDir;

const TTL: Duration = Duration::ZERO;
const ROOT: INodeNo = INodeNo(1);

/// Something done to a file, named by its number, or to the folder.
#[derive(Clone, Debug)]
pub enum Op {
    /// A new, empty file.
    Create {
        /// Its name.
        name: OsString,
        /// Its number.
        file: u64,
    },
    /// A write.
    Write {
        /// The file.
        file: u64,
        /// Position of the first byte.
        at: usize,
        /// What was written.
        bytes: Vec<u8>,
    },
    /// A change of the length, by `ftruncate`.
    Resize {
        /// The file.
        file: u64,
        /// The new length in bytes.
        len: usize,
    },
    /// A hole or zeros, by `fallocate`.
    Zero {
        /// The file.
        file: u64,
        /// Position of the first byte.
        at: usize,
        /// Bytes that are zero now.
        len: usize,
    },
    /// An `fsync` of a file.
    Sync {
        /// The file.
        file: u64,
    },
    /// A new name in place of the old one.
    Rename {
        /// The old name.
        from: OsString,
        /// The new name.
        to: OsString,
    },
    /// A further name.
    Link {
        /// The file.
        file: u64,
        /// The further name.
        name: OsString,
    },
    /// A name that is gone.
    Remove {
        /// The name.
        name: OsString,
    },
    /// An `fsync` of the folder.
    SyncFolder,
}

/// What a folder of files holds.
#[derive(Clone, Debug, Default)]
struct Files {
    names: BTreeMap<OsString, u64>,
    content: BTreeMap<u64, Vec<u8>>,
}

impl Files {
    fn apply(&mut self, op: &Op) {
        match op {
            Op::Create { name, file } => {
                self.names.insert(name.clone(), *file);
                self.content.entry(*file).or_default();
            }
            Op::Write { file, at, bytes } => {
                let content = self.content.entry(*file).or_default();
                if content.len() < at + bytes.len() {
                    content.resize(at + bytes.len(), 0);
                }
                content[*at..at + bytes.len()].copy_from_slice(bytes);
            }
            Op::Resize { file, len } => self.content.entry(*file).or_default().resize(*len, 0),
            Op::Zero { file, at, len } => {
                let content = self.content.entry(*file).or_default();
                let end = (at + len).min(content.len());
                content[(*at).min(end)..end].fill(0);
            }
            Op::Rename { from, to } => {
                if let Some(file) = self.names.remove(from) {
                    self.names.insert(to.clone(), file);
                }
            }
            Op::Link { file, name } => {
                self.names.insert(name.clone(), *file);
            }
            Op::Remove { name } => {
                self.names.remove(name);
            }
            Op::Sync { .. } | Op::SyncFolder => {}
        }
    }
}

/// What can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// To make a file.
    Create,
    /// To write.
    Write,
    /// To change the length.
    Resize,
    /// To take room for what is written later.
    Reserve,
    /// To sync a file.
    Sync,
    /// From this name.
    Rename,
    /// To this name.
    Link,
    /// To sync the folder.
    SyncFolder,
}

/// A call that fails.
#[derive(Clone, Debug)]
struct Fault {
    call: Call,
    name: OsString,
    errno: Errno,
}

#[derive(Default)]
struct State {
    files: Files,
    log: Vec<Op>,
    next: u64,
    faults: Vec<Fault>,
    /// Name of the file whose syncs are not answered, or with which those of the folder are not;
    /// and what is not answered.
    holding: Option<OsString>,
    holding_folder: Option<OsString>,
    held: Vec<(Op, ReplyEmpty)>,
}

struct Recording(Arc<Mutex<State>>);

/// The mounted file system; unmounted when dropped.
pub struct Recorder {
    // Before the folder it is mounted on.
    session: Option<BackgroundSession>,
    folder: TempDir,
    state: Arc<Mutex<State>>,
}

impl Recorder {
    /// Mounts an empty one.
    pub fn mount() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let state = Arc::<Mutex<State>>::default();
        state.lock().unwrap().next = ROOT.0 + 1;
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("recorder".into())];
        let files = Recording(Arc::clone(&state));
        let session = fuser::spawn_mount(files, folder.path(), &config)
            .expect("a FUSE mount: it needs /dev/fuse, and root or fusermount3");
        Self {
            session: Some(session),
            folder,
            state,
        }
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Number of things done so far.
    pub fn position(&self) -> usize {
        self.state.lock().unwrap().log.len()
    }

    /// All that was done.
    pub fn log(&self) -> Vec<Op> {
        self.state.lock().unwrap().log.clone()
    }

    /// From now on, `call` to the file `name` fails with `errno`, and does nothing.
    pub fn fail(&self, call: Call, name: &str, errno: Errno) {
        let name = name.into();
        let fault = Fault { call, name, errno };
        self.state.lock().unwrap().faults.push(fault);
    }

    /// Syncs of the file `name` are neither done nor answered before what this returns is dropped.
    pub fn hold_syncs(&self, name: &str) -> Held<'_> {
        self.state.lock().unwrap().holding = Some(name.into());
        Held(self)
    }

    /// Syncs of the folder, once there is a file `name` in it, are neither done nor answered before
    /// what this returns is dropped.
    pub fn hold_folder_syncs(&self, name: &str) -> Held<'_> {
        self.state.lock().unwrap().holding_folder = Some(name.into());
        Held(self)
    }

    /// Whether a sync is not answered.
    pub fn is_holding(&self) -> bool {
        !self.state.lock().unwrap().held.is_empty()
    }

    /// Lets everything succeed again, and answers what was held.
    pub fn heal(&self) {
        let mut state = self.state.lock().unwrap();
        state.faults.clear();
        (state.holding, state.holding_folder) = (None, None);
        for (op, reply) in std::mem::take(&mut state.held) {
            state.act(op);
            reply.ok();
        }
    }

    /// Names of the files there are.
    pub fn names(&self) -> Vec<OsString> {
        let state = self.state.lock().unwrap();
        state.files.names.keys().cloned().collect()
    }
}

/// Syncs that are not answered: who waits for one cannot even be killed.
pub struct Held<'a>(&'a Recorder);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.heal();
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        drop(self.session.take());
    }
}

/// What is left when the process dies: everything.
pub fn after_kill(log: &[Op], into: &Path) {
    let mut files = Files::default();
    log.iter().for_each(|op| files.apply(op));
    files.write(into);
}

/// What may be left when the power fails: what was synced, and of the rest, what `survives` says,
/// asked for each sector written and each other change.
pub fn after_power_loss(log: &[Op], into: &Path, mut survives: impl FnMut() -> bool) {
    let mut durable = Files::default();
    let mut pending: Vec<&Op> = Vec::new();
    for op in log {
        let settles: &dyn Fn(&Op) -> bool = match op {
            Op::Sync { file } => &|op| op.file() == Some(*file),
            Op::SyncFolder => &|op| op.file().is_none(),
            _ => {
                pending.push(op);
                continue;
            }
        };
        pending.retain(|op| {
            let settled = settles(op);
            if settled {
                durable.apply(op);
            }
            !settled
        });
    }
    let mut names_in_order = true;
    for op in pending {
        match op {
            Op::Write { file, at, bytes } => {
                // Up to the ends of the file's sectors.
                let mut done = 0;
                while done < bytes.len() {
                    let part = (512 - (at + done) % 512).min(bytes.len() - done);
                    if survives() {
                        durable.apply(&Op::Write {
                            file: *file,
                            at: at + done,
                            bytes: bytes[done..done + part].to_vec(),
                        });
                    }
                    done += part;
                }
            }
            op if op.file().is_some() => {
                if survives() {
                    durable.apply(op);
                }
            }
            // A file system keeps changes of names in order.
            op => {
                names_in_order &= survives();
                if names_in_order {
                    durable.apply(op);
                }
            }
        }
    }
    durable.write(into);
}

impl Op {
    /// The file whose content it changes.
    fn file(&self) -> Option<u64> {
        match self {
            Op::Write { file, .. } | Op::Resize { file, .. } | Op::Zero { file, .. } => Some(*file),
            _ => None,
        }
    }
}

impl Files {
    fn write(&self, into: &Path) {
        for (name, file) in &self.names {
            let content = self.content.get(file).map_or(&[][..], |content| content);
            fs::write(into.join(name), content).unwrap();
        }
    }
}

impl Recording {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }
}

impl State {
    fn act(&mut self, op: Op) {
        self.files.apply(&op);
        self.log.push(op);
    }

    /// Does what `op` says and answers, now or later.
    fn sync(&mut self, op: Op, is_held: bool, reply: ReplyEmpty) {
        match is_held {
            true => self.held.push((op, reply)),
            false => {
                self.act(op);
                reply.ok();
            }
        }
    }

    /// Whether a call to the file of this name is to fail.
    fn check(&self, call: Call, name: &OsStr) -> Result<(), Errno> {
        let fails = |fault: &&Fault| fault.call == call && fault.name == name;
        let fault = self.faults.iter().find(fails);
        fault.map_or(Ok(()), |fault| Err(fault.errno))
    }

    /// Whether a call to this file is to fail.
    fn check_file(&self, call: Call, ino: INodeNo) -> Result<(), Errno> {
        let names = self.files.names.iter();
        let mut own = names.filter(|(_, file)| **file == ino.0);
        own.try_for_each(|(name, _)| self.check(call, name))
    }

    fn content(&self, ino: INodeNo) -> &[u8] {
        let content = self.files.content.get(&ino.0);
        content.map_or(&[], |content| content)
    }

    fn attributes(&self, ino: INodeNo) -> FileAttr {
        let len = self.content(ino).len() as u64;
        FileAttr {
            ino,
            size: len,
            blocks: len.div_ceil(512),
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: match ino {
                ROOT => FileType::Directory,
                _ => FileType::RegularFile,
            },
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

impl Filesystem for Recording {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let state = self.state();
        match state.files.names.get(name) {
            Some(file) => reply.entry(&TTL, &state.attributes(INodeNo(*file)), Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.state().attributes(ino));
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let mut state = self.state();
        if let Some(size) = size {
            if let Err(errno) = state.check_file(Call::Resize, ino) {
                return reply.error(errno);
            }
            let len = size as usize;
            state.act(Op::Resize { file: ino.0, len });
        }
        reply.attr(&TTL, &state.attributes(ino));
    }

    fn create(
        &self,
        _: &Request,
        _: INodeNo,
        name: &OsStr,
        _: u32,
        _: u32,
        _: i32,
        reply: ReplyCreate,
    ) {
        let mut state = self.state();
        if let Err(errno) = state.check(Call::Create, name) {
            return reply.error(errno);
        }
        let file = state.next;
        state.next += 1;
        let name = name.to_owned();
        state.act(Op::Create { name, file });
        let attributes = state.attributes(INodeNo(file));
        let flags = FopenFlags::FOPEN_DIRECT_IO;
        reply.created(&TTL, &attributes, Generation(0), FileHandle(0), flags);
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let state = self.state();
        let content = state.content(ino);
        let start = (offset as usize).min(content.len());
        let end = (start + size as usize).min(content.len());
        reply.data(&content[start..end]);
    }

    fn write(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let mut state = self.state();
        if let Err(errno) = state.check_file(Call::Write, ino) {
            return reply.error(errno);
        }
        state.act(Op::Write {
            file: ino.0,
            at: offset as usize,
            bytes: data.to_vec(),
        });
        reply.written(data.len() as u32);
    }

    fn fallocate(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let mut state = self.state();
        if mode & (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) == 0 {
            return match state.check_file(Call::Reserve, ino) {
                Err(errno) => reply.error(errno),
                Ok(()) => reply.ok(),
            };
        }
        state.act(Op::Zero {
            file: ino.0,
            at: offset as usize,
            len: length as usize,
        });
        reply.ok();
    }

    fn fsync(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let mut state = self.state();
        if let Err(errno) = state.check_file(Call::Sync, ino) {
            return reply.error(errno);
        }
        let held = state.holding.as_ref();
        let held = held.and_then(|name| state.files.names.get(name));
        let held = held == Some(&ino.0);
        state.sync(Op::Sync { file: ino.0 }, held, reply);
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let mut state = self.state();
        if let Err(errno) = state.check(Call::SyncFolder, OsStr::new("")) {
            return reply.error(errno);
        }
        let held = state.holding_folder.as_ref();
        let held = held.is_some_and(|name| state.files.names.contains_key(name));
        state.sync(Op::SyncFolder, held, reply);
    }

    fn rename(
        &self,
        _: &Request,
        _: INodeNo,
        name: &OsStr,
        _: INodeNo,
        newname: &OsStr,
        _: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let mut state = self.state();
        if let Err(errno) = state.check(Call::Rename, name) {
            return reply.error(errno);
        }
        state.act(Op::Rename {
            from: name.to_owned(),
            to: newname.to_owned(),
        });
        reply.ok();
    }

    fn link(&self, _: &Request, ino: INodeNo, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let mut state = self.state();
        if let Err(errno) = state.check(Call::Link, name) {
            return reply.error(errno);
        }
        let (file, name) = (ino.0, name.to_owned());
        state.act(Op::Link { file, name });
        reply.entry(&TTL, &state.attributes(ino), Generation(0));
    }

    fn unlink(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = name.to_owned();
        self.state().act(Op::Remove { name });
        reply.ok();
    }
}
