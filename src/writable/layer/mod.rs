//! A writable layer in use. Each module below has one kind of change.

mod discard;
mod flush;
mod freeze;
mod grow;
mod open;
mod seal;
mod write;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

use arc_swap::ArcSwap;

use super::Paths;
use super::allocator::Allocator;
use super::data_file::DataFile;
use super::extent_map::{ExtentMap, Place, mappings};
use super::growing_coverage::GrowingCoverage;
use super::index_file::{self, IndexFile};
use super::journal::Journal;
use super::locks::{RankedMutex, RankedRwLock};
use super::lookup::{Lookup, SpanContent};
use super::reservation::Reservation;
use crate::format::lsmt::writable::Kind;
use crate::format::lsmt::{FIRST_DATA, Header, Mapping};
use crate::source::Blob;
use crate::units::{Sector, SectorRange};

pub use discard::MAX_STEP;

/// How a writable layer is used.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Most bytes of data.
    pub limit: u64,
    /// Bounds that no user sets.
    pub bounds: Bounds,
}

/// Bounds of what a writable layer keeps for its flushes. Tests set small ones to reach them.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Most mappings that wait for a flush. A change beyond that needs a flush first.
    pub max_pending: usize,
    /// The index is rewritten when it has twice the entries that its map needs, and this many more.
    pub index_slack: u64,
    /// Most entries of the index file.
    pub max_index_entries: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            limit: u64::MAX,
            bounds: Bounds::default(),
        }
    }
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            max_pending: 1 << 20,
            index_slack: 1 << 16,
            max_index_entries: index_file::MAX_INDEX_ENTRIES,
        }
    }
}

/// An open writable layer. Any number of threads read and write it.
///
/// The order of its locks is in [`locks`](super::locks).
#[derive(Debug)]
pub struct WritableLayer {
    paths: Paths,
    /// Replaced when the disk grows.
    header: ArcSwap<Header>,
    kind: Kind,
    data: DataFile,
    limit: u64,
    coverage: GrowingCoverage,
    /// Freeze gate: changes hold it shared. `true` once frozen.
    gate: RankedRwLock<bool>,
    placement: RankedRwLock<Placement>,
    /// Each change of the map locks this together with `placement`, so that both agree.
    pending: RankedMutex<Pending>,
    bounds: Bounds,
    /// Whether changes and flushes fail: the storage lost data, or the next start may not find the layer.
    broken: AtomicBool,
    /// Whether the data file has been sealed.
    sealed: AtomicBool,
    /// Newest flush ticket.
    tickets: AtomicU64,
    flush: RankedMutex<Flusher>,
}

/// Where the content of the disk is, and where there is space.
#[derive(Debug)]
struct Placement {
    map: ExtentMap,
    allocator: Allocator,
}

/// What the next flush enters in the index.
#[derive(Debug)]
struct Pending {
    journal: Journal,
    /// Whether the journal points at data that the storage lost, and could not be emptied yet.
    journal_misleads: bool,
    /// Space in the index file for `mappings`.
    reservation: Reservation,
    /// The mappings that are in the journal and not in the index.
    mappings: Vec<Mapping>,
}

/// The state of flushes; one flush runs at a time.
#[derive(Debug)]
struct Flusher {
    index: IndexFile,
    /// Whether the next flush rewrites the index, for a reason found when the layer was opened.
    rewrite: Rewrite,
    /// Number of index entries at which a failed rewrite is tried again.
    retry_at: u64,
    /// Newest flush ticket covered by a successful flush.
    done: u64,
    /// Whether the headers of the files may name another size than the disk has.
    files_may_have_other_size: bool,
}

/// Whether a flush rewrites the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rewrite {
    /// It appends.
    No,
    /// If the rewrite fails, it appends.
    Wanted,
    /// If the rewrite fails, the flush fails.
    Needed,
}

impl WritableLayer {
    /// Returns the paths of its files.
    pub fn paths(&self) -> &Paths {
        &self.paths
    }

    /// Returns the header of its data file.
    pub fn header(&self) -> Arc<Header> {
        self.header.load_full()
    }

    /// Returns how data is placed.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Returns the bytes of data that count towards the limit.
    pub fn used(&self) -> u64 {
        let header = FIRST_DATA - Sector(0);
        (self.placement.read().allocator.used() - header).bytes()
    }

    /// Returns the number of index entries that describe its map.
    pub fn mappings(&self) -> u64 {
        self.placement.read().map.mappings()
    }

    /// Returns the number of extents of its map.
    pub fn extents(&self) -> usize {
        self.placement.read().map.len()
    }

    /// Returns whether it may have extents in `range`. Takes no lock.
    #[inline]
    pub fn may_hold(&self, range: SectorRange) -> bool {
        self.coverage.any(range)
    }

    /// Appends the spans that make up `range` to `into`, until that is full. Sectors without an extent lie below.
    pub(super) fn spans(&self, range: SectorRange, into: &mut Lookup) {
        let placement = self.placement.read();
        let mut at = range.start();
        for extent in placement.map.within(range) {
            if into.is_full() {
                return;
            }
            if at < extent.start() {
                into.push(SectorRange::new(at, extent.start()), SpanContent::Lower);
            }
            let content = match extent.place() {
                Place::Zero => SpanContent::Zero,
                Place::Data(sector) => SpanContent::Data {
                    file: into.number_of(self.data.blob(), || placement.allocator.hold()),
                    offset: sector.byte(),
                },
            };
            into.push(extent.range(), content);
            at = extent.end();
        }
        if at < range.end() {
            into.push(SectorRange::new(at, range.end()), SpanContent::Lower);
        }
    }

    /// Returns the data file as readers use it.
    pub(super) fn blob(&self) -> &Arc<Blob> {
        self.data.blob()
    }

    /// Returns the index entries that describe its map.
    pub(super) fn index_entries(&self) -> Vec<Mapping> {
        mappings(&self.placement.read().map).collect()
    }
}
