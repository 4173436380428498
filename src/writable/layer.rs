//! A writable layer in use.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::allocator::Allocator;
use super::coverage::Coverage;
use super::extent_map::{ExtentMap, Place};
use super::index_file::{self, IndexFile, sync_folder_of};
use super::journal::Journal;
use super::lookup::{Lookup, MAX_SPANS, Span, SpanContent};
use super::reservation::Reservation;
use super::{Error, Paths};
use crate::format::lsmt::writable::{Kind, encode_data_header};
use crate::format::lsmt::{FIRST_DATA, HEADER_LEN, Header, MAX_SECTORS, Mapping};
use crate::source::Blob;
use crate::units::SECTOR_SIZE;

/// How an upper is used.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Most bytes of data it may hold.
    pub limit: u64,
    /// Size of the disk in bytes, for an upper that does not say it.
    pub default_size: u64,
    /// Mappings that wait for a flush at most: with that many, a change flushes first.
    pub max_pending: usize,
    /// The log is written anew when it has twice the entries that its map needs, and this many more.
    pub log_slack: u64,
    /// Most entries of the log.
    pub max_log: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            limit: u64::MAX,
            default_size: 0,
            max_pending: 1 << 20,
            log_slack: 1 << 16,
            max_log: index_file::MAX_ENTRIES,
        }
    }
}

/// Makes the files of an empty layer, durable and under their names.
///
/// # Errors
/// A file of either name exists, or cannot be written; the size is impossible.
pub fn create(paths: &Paths, kind: Kind, header: &Header) -> Result<(), Error> {
    check_size(header.virtual_size)?;
    let path = &paths.data;
    let file = File::options().write(true).create_new(true).open(path);
    let file = file.map_err(Error::file("create", path))?;
    // Half a layer would be in the way of the next try.
    let remove = |path: &PathBuf| drop(fs::remove_file(path));
    write_data_file(&file, path, kind, header)
        .and_then(|()| create_index(&paths.index, &file, kind, header))
        .and_then(|()| {
            let synced = sync_folder_of(path).and_then(|()| sync_folder_of(&paths.index));
            synced.inspect_err(|_| remove(&paths.index))
        })
        .inspect_err(|_| remove(path))
}

fn write_data_file(file: &File, path: &Path, kind: Kind, header: &Header) -> Result<(), Error> {
    file.write_all_at(&encode_data_header(header, kind), 0)
        .map_err(Error::bytes("write", path, 0))?;
    if kind == Kind::Sparse {
        let len = header.virtual_size + HEADER_LEN as u64;
        file.set_len(len).map_err(Error::file("enlarge", path))?;
    }
    file.sync_all().map_err(Error::file("sync", path))
}

/// A sparse layer begins without an index, where the file system tells holes from zeros: tools that
/// go by the holes may write to it as well, until we do.
fn create_index(path: &Path, data: &File, kind: Kind, header: &Header) -> Result<(), Error> {
    let first = SeekFrom::Data(HEADER_LEN as u64);
    if kind != Kind::Sparse || rustix::fs::seek(data, first) != Err(Errno::NXIO) {
        return IndexFile::create(path, header);
    }
    let made = File::create_new(path).map_err(Error::file("create", path))?;
    made.sync_all()
        .map_err(Error::file("sync", path))
        .inspect_err(|_| drop(fs::remove_file(path)))
}

/// Refuses a disk that writable layers cannot have.
pub(super) fn check_size(size: u64) -> Result<(), Error> {
    let whole = size.is_multiple_of(SECTOR_SIZE) && size / SECTOR_SIZE <= MAX_SECTORS;
    match size > 0 && whole {
        true => Ok(()),
        false => Err(Error::Size(size)),
    }
}

/// A writable layer, open. Any number of threads read and write it.
#[derive(Debug)]
pub struct WritableLayer {
    pub(super) paths: Paths,
    pub(super) header: Header,
    pub(super) kind: Kind,
    pub(super) file: File,
    pub(super) blob: Arc<Blob>,
    pub(super) limit: u64,
    pub(super) touched: Coverage,
    /// Held by every change while it is under way, and by who lets no more of them begin. Whether
    /// that is so.
    pub(super) gate: RwLock<bool>,
    /// Where everything is. No one waits for storage with this locked.
    pub(super) state: RwLock<State>,
    /// Locked before `state` by whoever changes the map, until both say the same.
    pub(super) waiting: Mutex<Waiting>,
    pub(super) max_pending: usize,
    pub(super) log_slack: u64,
    pub(super) max_log: u64,
    /// Bytes that the data file has at least, unless somebody cut it short.
    pub(super) len: AtomicU64,
    /// Whether data was written since the last sync began.
    pub(super) dirty: AtomicBool,
    /// Storage lost something, or might.
    pub(super) broken: AtomicBool,
    /// Whether its data file is a layer like any other by now.
    pub(super) sealed: AtomicBool,
    /// Flushes asked for so far.
    pub(super) asked: AtomicU64,
    pub(super) flush: Mutex<Flusher>,
}

/// What changes with every mapping.
#[derive(Debug)]
pub(super) struct State {
    pub(super) map: ExtentMap,
    pub(super) space: Allocator,
}

/// What a flush will enter in the index.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) journal: Journal,
    /// Whether the journal points at data that storage lost, and could not be emptied yet.
    pub(super) journal_misleads: bool,
    /// In the index, for what waits.
    pub(super) room: Reservation,
    /// What is in the journal and not in the index.
    pub(super) pending: Vec<Mapping>,
}

/// Who makes things durable; one at a time.
#[derive(Debug)]
pub(super) struct Flusher {
    pub(super) log: IndexFile,
    /// Whether the next flush writes the index anew, for what was found at the start.
    pub(super) rewrite: Rewrite,
    /// Entries from which on it is tried to write the log anew.
    pub(super) retry_at: u64,
    /// Flushes asked for that the last successful one did for.
    pub(super) done: u64,
}

/// Whether a flush writes the index anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Rewrite {
    /// It appends.
    No,
    /// If that fails, it appends.
    Wanted,
    /// If that fails, the flush fails.
    Needed,
}

impl WritableLayer {
    /// Its files.
    pub fn paths(&self) -> &Paths {
        &self.paths
    }

    /// What its data file says about the layer.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// How it places data.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Bytes of data that the limit counts.
    pub fn used(&self) -> u64 {
        (self.state().space.used() - FIRST_DATA.0) * SECTOR_SIZE
    }

    /// Index entries that say what it holds.
    pub fn mappings(&self) -> u64 {
        self.state().map.mappings()
    }

    /// Extents of its map.
    pub fn extents(&self) -> usize {
        self.state().map.len()
    }

    /// Whether it may hold some of `sectors` sectors, at least 1, from `start` on. Takes no lock.
    #[inline]
    pub fn may_hold(&self, start: u64, sectors: u64) -> bool {
        self.touched.any(start, sectors)
    }

    /// Appends the spans that make up a range to `into`, until that is full; what it does not hold
    /// lies below. `file` is the number of its data file there, once it has one.
    pub(super) fn spans(
        &self,
        start: u64,
        sectors: u64,
        into: &mut Lookup,
        file: &mut Option<u32>,
    ) {
        let end = start + sectors;
        let state = self.state();
        let mut at = start;
        let below = |from: u64, to: u64| Span {
            sectors: to - from,
            content: SpanContent::Lower,
        };
        for extent in state.map.within(start..end) {
            if into.spans.len() >= MAX_SPANS {
                return;
            }
            if extent.start > at {
                into.spans.push(below(at, extent.start));
            }
            let content = match extent.place {
                Place::Zero => SpanContent::Zero,
                Place::Data(sector) => SpanContent::Data {
                    file: *file.get_or_insert_with(|| {
                        let known = into
                            .files
                            .iter()
                            .position(|(blob, _)| Arc::ptr_eq(blob, &self.blob));
                        // What was held first keeps all that is freed later.
                        let number = known.unwrap_or_else(|| {
                            into.files.push((self.blob.clone(), state.space.hold()));
                            into.files.len() - 1
                        });
                        // One for each upper, of which there are few.
                        number as u32
                    }),
                    offset: sector * SECTOR_SIZE,
                },
            };
            into.spans.push(Span {
                sectors: extent.len,
                content,
            });
            at = extent.end();
        }
        if at < end {
            into.spans.push(below(at, end));
        }
    }

    pub(super) fn state(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn state_mut(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn flusher(&self) -> MutexGuard<'_, Flusher> {
        self.flush.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
