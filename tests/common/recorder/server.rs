//! The calls of the kernel.

use std::ffi::OsStr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, Errno, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request, TimeOrNow, WriteFlags,
};

use super::log::Op;
use super::state::{Call, State};

/// Nothing but the content of the given file is remembered by the kernel.
const TTL: Duration = Duration::ZERO;

/// The file system as `fuser` calls it.
pub(super) struct Server(pub(super) Arc<Mutex<State>>);

impl Server {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }
}

impl Filesystem for Server {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let state = self.state();
        match state.files().names.get(name) {
            Some(file) => reply.entry(&TTL, &state.attributes(INodeNo(*file)), Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        self.state().tell_attributes(ino, reply);
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
        let file = state.next_file();
        let name = name.to_owned();
        state.act(Op::Create { name, file });
        let attributes = state.attributes(INodeNo(file));
        let flags = FopenFlags::FOPEN_DIRECT_IO;
        reply.created(&TTL, &attributes, Generation(0), FileHandle(0), flags);
    }

    fn open(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let flags = match self.state().is_kept(ino) {
            true => FopenFlags::FOPEN_KEEP_CACHE,
            false => FopenFlags::FOPEN_DIRECT_IO,
        };
        reply.opened(FileHandle(0), flags);
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
        let range = offset..offset + u64::from(size);
        self.state().read(ino, range, reply);
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
        let len = match state.check_write(ino, data.len()) {
            Ok(len) => len,
            Err(errno) => return reply.error(errno),
        };
        state.act(Op::Write {
            file: ino.0,
            at: offset as usize,
            bytes: data[..len].to_vec(),
        });
        reply.written(len as u32);
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
        if let Err(errno) = state.outage().whole_step() {
            return reply.error(errno);
        }
        state.act(Op::Zero {
            file: ino.0,
            at: offset as usize,
            len: length as usize,
        });
        reply.ok();
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        self.state().flush(reply);
    }

    fn fsync(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let mut state = self.state();
        // Only an outage takes what was written: a test that names the file reads it afterwards.
        if let Err(errno) = state.outage().whole_step() {
            state.lose(ino);
            return reply.error(errno);
        }
        if let Err(errno) = state.check_names(Call::Sync, ino) {
            return reply.error(errno);
        }
        state.sync(ino, reply);
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let mut state = self.state();
        if let Err(errno) = state.check(Call::SyncFolder, OsStr::new("")) {
            return reply.error(errno);
        }
        state.sync_folder(reply);
    }

    fn readdir(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let state = self.state();
        let names = state.files().names.iter().zip(1..);
        for ((name, file), next) in names.skip(offset as usize) {
            if reply.add(INodeNo(*file), next, FileType::RegularFile, name) {
                break;
            }
        }
        reply.ok();
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
        let mut state = self.state();
        if let Err(errno) = state.outage().whole_step() {
            return reply.error(errno);
        }
        let name = name.to_owned();
        state.act(Op::Remove { name });
        reply.ok();
    }
}
