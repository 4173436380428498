//! The files, the log of what was done to them, and what is wrong with them at the moment.

use std::ffi::{OsStr, OsString};
use std::mem;
use std::ops::Range;
use std::time::{Duration, UNIX_EPOCH};

use fuser::{Errno, FileAttr, FileType, INodeNo, ReplyAttr, ReplyData, ReplyEmpty};

use super::log::{Files, Op};
use super::outage::Outage;
use crate::content::Random;

/// The folder.
pub(super) const ROOT: INodeNo = INodeNo(1);

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

/// A call that is not answered yet.
enum Held {
    Sync(Op, ReplyEmpty),
    Read(INodeNo, Range<u64>, ReplyData),
    Attributes(INodeNo, ReplyAttr),
    Flush(ReplyEmpty),
}

/// Everything about the file system.
pub(super) struct State {
    files: Files,
    log: Vec<Op>,
    next: u64,
    /// The file that was there from the beginning: the kernel keeps what is read of it.
    given: Option<INodeNo>,
    faults: Vec<Fault>,
    failing_reads: Vec<Range<u64>>,
    held_reads: Vec<Range<u64>>,
    /// Name of the file whose syncs are not answered.
    held_syncs: Option<OsString>,
    /// Name of the file with which syncs of the folder are not answered.
    held_folder_syncs: Option<OsString>,
    /// Whether `fstat` and `close` are not answered.
    holds_attributes: bool,
    held: Vec<Held>,
    outage: Outage,
    /// Says what a failed sync loses.
    luck: Random,
}

fn overlaps(ranges: &[Range<u64>], with: &Range<u64>) -> bool {
    let overlap = |range: &Range<u64>| range.start < with.end && with.start < range.end;
    ranges.iter().any(overlap)
}

impl State {
    /// No file, and nothing wrong.
    pub(super) fn new() -> Self {
        Self {
            files: Files::default(),
            log: Vec::new(),
            next: ROOT.0 + 1,
            given: None,
            faults: Vec::new(),
            failing_reads: Vec::new(),
            held_reads: Vec::new(),
            held_syncs: None,
            held_folder_syncs: None,
            holds_attributes: false,
            held: Vec::new(),
            outage: Outage::default(),
            luck: Random::new(1),
        }
    }

    /// No file, and nothing done. Numbers of files are not used again.
    pub(super) fn clear(&mut self) {
        let (next, luck) = (self.next, Random::new(self.luck.any()));
        *self = Self {
            next,
            luck,
            ..Self::new()
        };
    }

    /// Steps that fail.
    pub(super) fn outage(&mut self) -> &mut Outage {
        &mut self.outage
    }

    /// Puts a file there as if it had always been there.
    pub(super) fn give(&mut self, name: &str, content: Vec<u8>) {
        let file = self.next_file();
        self.files.names.insert(name.into(), file);
        self.files.content.insert(file, content);
        self.given = Some(INodeNo(file));
    }

    /// All that was done.
    pub(super) fn log(&self) -> &[Op] {
        &self.log
    }

    /// The files.
    pub(super) fn files(&self) -> &Files {
        &self.files
    }

    /// The number of a new file.
    pub(super) fn next_file(&mut self) -> u64 {
        let file = self.next;
        self.next += 1;
        file
    }

    /// Whether the kernel keeps what is read of a file.
    pub(super) fn is_kept(&self, ino: INodeNo) -> bool {
        self.given == Some(ino)
    }

    /// `call` to the file `name` fails from now on.
    pub(super) fn fail(&mut self, call: Call, name: &str, errno: Errno) {
        let name = name.into();
        self.faults.push(Fault { call, name, errno });
    }

    /// Reads of the given file that touch `range` fail from now on.
    pub(super) fn fail_reads(&mut self, range: Range<u64>) {
        self.failing_reads.push(range);
    }

    /// Reads of the given file that touch `range` are not answered from now on.
    pub(super) fn hold_reads(&mut self, range: Range<u64>) {
        self.held_reads.push(range);
    }

    /// Syncs of the file `name` are not answered from now on.
    pub(super) fn hold_syncs(&mut self, name: &str) {
        self.held_syncs = Some(name.into());
    }

    /// Syncs of the folder are not answered from now on, while there is a file `name`.
    pub(super) fn hold_folder_syncs(&mut self, name: &str) {
        self.held_folder_syncs = Some(name.into());
    }

    /// Whether a call is not answered.
    pub(super) fn is_holding(&self) -> bool {
        !self.held.is_empty()
    }

    pub(super) fn hold_attributes(&mut self) {
        self.holds_attributes = true;
    }

    /// Answers an `fstat`.
    pub(super) fn tell_attributes(&mut self, ino: INodeNo, reply: ReplyAttr) {
        match self.holds_attributes {
            true => self.held.push(Held::Attributes(ino, reply)),
            false => reply.attr(&Duration::ZERO, &self.attributes(ino)),
        }
    }

    /// Answers a `close`.
    pub(super) fn flush(&mut self, reply: ReplyEmpty) {
        match self.holds_attributes {
            true => self.held.push(Held::Flush(reply)),
            false => reply.ok(),
        }
    }

    /// Lets everything succeed again, and answers what was held.
    pub(super) fn heal(&mut self) {
        self.faults.clear();
        self.outage.end();
        self.failing_reads.clear();
        self.held_reads.clear();
        (self.held_syncs, self.held_folder_syncs) = (None, None);
        self.holds_attributes = false;
        for held in mem::take(&mut self.held) {
            match held {
                Held::Sync(op, reply) => {
                    self.act(op);
                    reply.ok();
                }
                Held::Read(ino, range, reply) => reply.data(self.bytes(ino, &range)),
                Held::Attributes(ino, reply) => reply.attr(&Duration::ZERO, &self.attributes(ino)),
                Held::Flush(reply) => reply.ok(),
            }
        }
    }

    /// Does what `op` says.
    pub(super) fn act(&mut self, op: Op) {
        self.files.apply(&op);
        self.log.push(op);
    }

    /// Answers a read, now or later.
    pub(super) fn read(&mut self, ino: INodeNo, range: Range<u64>, reply: ReplyData) {
        let is_given = self.given == Some(ino);
        if is_given && overlaps(&self.failing_reads, &range) {
            reply.error(Errno::EIO);
        } else if is_given && overlaps(&self.held_reads, &range) {
            self.held.push(Held::Read(ino, range, reply));
        } else {
            reply.data(self.bytes(ino, &range));
        }
    }

    /// Syncs a file and answers, now or later.
    pub(super) fn sync(&mut self, ino: INodeNo, reply: ReplyEmpty) {
        let held = self.held_syncs.as_ref();
        let held = held.and_then(|name| self.files.names.get(name));
        let is_held = held == Some(&ino.0);
        self.sync_unless(is_held, Op::Sync { file: ino.0 }, reply);
    }

    /// Syncs the folder and answers, now or later.
    pub(super) fn sync_folder(&mut self, reply: ReplyEmpty) {
        let held = self.held_folder_syncs.as_ref();
        let is_held = held.is_some_and(|name| self.files.names.contains_key(name));
        self.sync_unless(is_held, Op::SyncFolder, reply);
    }

    fn sync_unless(&mut self, is_held: bool, op: Op, reply: ReplyEmpty) {
        if is_held {
            self.held.push(Held::Sync(op, reply));
        } else {
            self.act(op);
            reply.ok();
        }
    }

    /// Counts a call to the file of this name, which may be to fail.
    pub(super) fn check(&mut self, call: Call, name: &OsStr) -> Result<(), Errno> {
        self.outage.whole_step()?;
        self.check_name(call, name)
    }

    /// Counts a call to this file, which may be to fail.
    pub(super) fn check_file(&mut self, call: Call, ino: INodeNo) -> Result<(), Errno> {
        self.outage.whole_step()?;
        self.check_names(call, ino)
    }

    /// Counts a write to this file; returns how many of so many bytes it takes.
    pub(super) fn check_write(&mut self, ino: INodeNo, len: usize) -> Result<usize, Errno> {
        let len = self.outage.write(ino, len)?;
        self.check_names(Call::Write, ino).map(|()| len)
    }

    fn check_name(&self, call: Call, name: &OsStr) -> Result<(), Errno> {
        let fails = |fault: &&Fault| fault.call == call && fault.name == name;
        let fault = self.faults.iter().find(fails);
        fault.map_or(Ok(()), |fault| Err(fault.errno))
    }

    /// Whether a call to this file is to fail.
    pub(super) fn check_names(&self, call: Call, ino: INodeNo) -> Result<(), Errno> {
        let names = self.files.names.iter();
        let mut own = names.filter(|(_, file)| **file == ino.0);
        own.try_for_each(|(name, _)| self.check_name(call, name))
    }

    /// A sync of a file fails: about half of the sectors that were written since the last one are gone.
    pub(super) fn lose(&mut self, ino: INodeNo) {
        // What is noted about the loss must succeed: else nothing tells of it after a crash.
        self.outage.end();
        let file = ino.0;
        let settles = |op: &&Op| match op {
            Op::Sync { file: own } | Op::LostSync { file: own, .. } => *own == file,
            _ => false,
        };
        let own = |op: &&Op| op.file() == Some(file);
        let unsynced = self.log.iter().rev().take_while(|op| !settles(op)).count();
        let (durable, later) = self.log.split_at(self.log.len() - unsynced);
        let mut files = Files::default();
        let durable = durable.iter().filter(|op| own(op) || settles(op));
        durable.for_each(|op| files.apply(op));
        for op in later.iter().filter(own) {
            match op {
                Op::Write { .. } => {
                    let stored = op.sectors().filter(|_| self.luck.coin());
                    stored.for_each(|sector| files.apply(&sector));
                }
                op => files.apply(op),
            }
        }
        let mut content = files.content.remove(&file).unwrap_or_default();
        // The length is kept.
        content.resize(self.content(ino).len(), 0);
        self.act(Op::LostSync { file, content });
    }

    fn content(&self, ino: INodeNo) -> &[u8] {
        let content = self.files.content.get(&ino.0);
        content.map_or(&[], |content| content)
    }

    fn bytes(&self, ino: INodeNo, range: &Range<u64>) -> &[u8] {
        let content = self.content(ino);
        let end = (range.end as usize).min(content.len());
        &content[(range.start as usize).min(end)..end]
    }

    /// Attributes of a file or of the folder.
    pub(super) fn attributes(&self, ino: INodeNo) -> FileAttr {
        attributes(ino, self.content(ino).len() as u64)
    }
}

/// Attributes of a regular file of `len` bytes, or of the root folder.
fn attributes(ino: INodeNo, len: u64) -> FileAttr {
    FileAttr {
        ino,
        size: len,
        blocks: len.div_ceil(512),
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: match ino {
            INodeNo::ROOT => FileType::Directory,
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
