//! A writable layer in use: what it holds, and the steps that change it, each in a module of its own.

mod flush;
mod open;
mod seal;
mod write;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::allocator::Allocator;
use super::coverage::Coverage;
use super::data_file::DataFile;
use super::extent_map::{ExtentMap, Place, mappings};
use super::index_file::{self, IndexFile, sync_folder_of};
use super::journal::Journal;
use super::locks::{RankedMutex, RankedRwLock};
use super::lookup::{Lookup, MAX_SPANS, Span, SpanContent};
use super::reservation::Reservation;
use super::{Error, Paths};
use crate::format::lsmt::writable::{Kind, encode_data_header};
use crate::format::lsmt::{FIRST_DATA, HEADER_LEN, Header, MAX_SECTORS, Mapping};
use crate::source::Blob;
use crate::units::SECTOR_SIZE;

pub use write::MAX_STEP;

/// How a writable layer is used.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Most bytes of data it may hold.
    pub limit: u64,
    /// Size of the disk in bytes, for a layer that does not say it.
    pub default_size: u64,
    /// Most mappings that wait for a flush: with that many, a change flushes first.
    pub max_pending: usize,
    /// The index is written anew when it has twice the entries that its map needs, and this many more.
    pub log_slack: u64,
    /// Most entries of the index file.
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

/// Creates the files of an empty layer, durable and under their names.
///
/// # Errors
/// [`Error::Size`]; [`Error::File`] or [`Error::Bytes`] if a file of either name exists, or cannot be
/// written.
pub fn create(paths: &Paths, kind: Kind, header: &Header) -> Result<(), Error> {
    check_size(header.virtual_size)?;
    let path = &paths.data;
    let file = File::options().write(true).create_new(true).open(path);
    let file = file.map_err(Error::file("create", path))?;
    // Half a layer would be in the way of another attempt.
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

/// A sparse layer begins without an index, where the file system tells holes from zeros: tools that go
/// by the holes may write to it as well, until this program opens it.
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

/// Refuses the size of a disk that a writable layer cannot have.
pub(super) fn check_size(size: u64) -> Result<(), Error> {
    let whole = size.is_multiple_of(SECTOR_SIZE) && size / SECTOR_SIZE <= MAX_SECTORS;
    match size > 0 && whole {
        true => Ok(()),
        false => Err(Error::Size(size)),
    }
}

/// A writable layer, open. Any number of threads read and write it.
///
/// The order of its locks is in [`locks`](super::locks).
#[derive(Debug)]
pub struct WritableLayer {
    paths: Paths,
    header: Header,
    kind: Kind,
    data: DataFile,
    limit: u64,
    coverage: Coverage,
    /// Freeze gate: changes hold it shared. `true` once frozen.
    gate: RankedRwLock<bool>,
    placement: RankedRwLock<Placement>,
    /// Locked, together with `placement`, by each change of the map, so that both say the same.
    pending: RankedMutex<Pending>,
    max_pending: usize,
    log_slack: u64,
    max_log: u64,
    /// Storage lost data, or the layer may not be found at the next start.
    broken: AtomicBool,
    /// Whether the data file is a read-only layer by now.
    sealed: AtomicBool,
    /// Newest flush ticket.
    tickets: AtomicU64,
    flush: RankedMutex<Flusher>,
}

/// Where everything is.
#[derive(Debug)]
struct Placement {
    map: ExtentMap,
    space: Allocator,
}

/// What the next flush enters in the index.
#[derive(Debug)]
struct Pending {
    journal: Journal,
    /// Whether the journal points at data that storage lost, and could not be emptied yet.
    journal_misleads: bool,
    /// Space in the index file for `mappings`.
    reservation: Reservation,
    /// The mappings that are in the journal and not in the index.
    mappings: Vec<Mapping>,
}

/// What a flush needs; one flush at a time.
#[derive(Debug)]
struct Flusher {
    index: IndexFile,
    /// Whether the next flush writes the index anew, for what was found at the start.
    rewrite: Rewrite,
    /// Number of entries at which a rewrite of the index is tried again.
    retry_at: u64,
    /// Newest ticket covered by a successful flush.
    done: u64,
}

/// Whether a flush writes the index anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rewrite {
    /// It appends.
    No,
    /// If that fails, it appends.
    Wanted,
    /// If that fails, the flush fails.
    Needed,
}

impl WritableLayer {
    /// The paths of its files.
    pub fn paths(&self) -> &Paths {
        &self.paths
    }

    /// The header of its data file.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// How the data is placed.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Bytes of data that the limit counts.
    pub fn used(&self) -> u64 {
        (self.placement.read().space.used() - FIRST_DATA.0) * SECTOR_SIZE
    }

    /// Number of index entries that say what it holds.
    pub fn mappings(&self) -> u64 {
        self.placement.read().map.mappings()
    }

    /// Extents of its map.
    pub fn extents(&self) -> usize {
        self.placement.read().map.len()
    }

    /// Whether it may hold some of `sectors` sectors, at least 1, from `start` on. Takes no lock.
    #[inline]
    pub fn may_hold(&self, start: u64, sectors: u64) -> bool {
        self.coverage.any(start, sectors)
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
        let placement = self.placement.read();
        let mut at = start;
        let below = |from: u64, to: u64| Span {
            sectors: to - from,
            content: SpanContent::Lower,
        };
        for extent in placement.map.within(start..end) {
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
                            .position(|(blob, _)| Arc::ptr_eq(blob, self.data.blob()));
                        // The first hold keeps all that is freed later.
                        let number = known.unwrap_or_else(|| {
                            into.files
                                .push((self.data.blob().clone(), placement.space.hold()));
                            into.files.len() - 1
                        });
                        // One for each writable layer, of which there are few.
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

    /// The file that readers use, as [`Lookup`] names it.
    pub(super) fn blob(&self) -> &Arc<Blob> {
        self.data.blob()
    }

    /// The index entries that say what it holds.
    pub(super) fn index_entries(&self) -> Vec<Mapping> {
        mappings(&self.placement.read().map).collect()
    }
}
