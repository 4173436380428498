//! Opens a writable layer to write to it.
//!
//! Writes that an earlier process answered and did not flush are in the journal. Their mappings are appended to
//! the index, durably, and the journal starts empty. If the storage has no space for that, the journal is continued,
//! and its mappings wait for the next flush like new ones.

use std::fs::{File, Metadata};
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, AtomicU64};

use arc_swap::ArcSwap;

use super::super::allocator::{Allocator, PAGE};
use super::super::data_file::DataFile;
use super::super::extent_map::{Extent, ExtentMap};
use super::super::growing_coverage::GrowingCoverage;
use super::super::journal::Journal;
use super::super::load::{Access, LayerParts, LoadedLayer, load};
use super::super::locks::{Rank, RankedMutex, RankedRwLock};
use super::super::reservation::Reservation;
use super::super::{Error, Options, Paths, WritableLayer};
use super::flush::is_long;
use super::{Flusher, Pending, Placement, Rewrite};
use crate::format::lsmt::writable::Kind;
use crate::format::lsmt::{FIRST_DATA, MAX_ENTRIES, MAX_SECTORS};
use crate::ratelimited_log;
use crate::units::{Sector, SectorRange, Sectors};

impl WritableLayer {
    /// Opens a layer to write to it. Makes the writes in its journal durable first, if there is space. A layer whose
    /// header has no size gets `default_size`, in bytes.
    ///
    /// # Errors
    /// Those of [`load`]; [`Error::NoLimit`], [`Error::Size`], [`Error::Fragmented`];
    /// [`Error::JournalVersion`]; [`Error::File`] and [`Error::Bytes`] if a file cannot be written.
    pub fn open(
        paths: &Paths,
        default_size: Option<u64>,
        options: &Options,
    ) -> Result<Self, Error> {
        let mut loaded = load(paths, Access::Write, ExtentMap::new())?;
        if loaded.kind() == Kind::Sparse && options.limit != u64::MAX {
            return Err(Error::NoLimit {
                path: paths.data.clone(),
            });
        }
        let disk_end = determine_size(paths, default_size, &mut loaded)?;
        if loaded.map().mappings() > MAX_ENTRIES {
            return Err(Error::Fragmented {
                path: paths.data.clone(),
                most: MAX_ENTRIES,
            });
        }
        let rewrite = match &loaded {
            loaded if loaded.must_rewrite_index() => Rewrite::Needed,
            loaded if loaded.index_is_stale() => Rewrite::Wanted,
            loaded if is_long(loaded.index(), loaded.map(), options.bounds.index_slack) => {
                Rewrite::Wanted
            }
            _ => Rewrite::No,
        };
        loaded.index().trim()?;
        let journal = loaded.open_journal(paths)?;
        let layer = Self::build(paths, options, loaded, (disk_end, rewrite, journal))?;
        layer.catch_up(rewrite)?;
        Ok(layer)
    }

    fn build(
        paths: &Paths,
        options: &Options,
        loaded: LoadedLayer,
        (disk_end, rewrite, journal): (Sector, Rewrite, Journal),
    ) -> Result<Self, Error> {
        let LayerParts {
            data,
            index,
            header,
            kind,
            map,
            journal: pending,
        } = loaded.into_parts();
        // A layer whose disk shrank may have extents beyond its end, where the disk can grow again.
        let coverage = GrowingCoverage::new(disk_end.max(map.end()));
        map.iter().for_each(|extent| coverage.set(extent.range()));
        let withhold = !pending.is_empty() || rewrite != Rewrite::No;
        let (allocator, data_end) = find_space(paths, &data, &map, options.limit, withhold)?;
        Ok(Self {
            paths: paths.clone(),
            kind,
            data: DataFile::new(&paths.data, data, data_end)?,
            limit: options.limit,
            coverage,
            gate: RankedRwLock::new(Rank::Gate, false),
            placement: RankedRwLock::new(Rank::Placement, Placement { map, allocator }),
            pending: RankedMutex::new(
                Rank::Pending,
                Pending {
                    journal,
                    journal_misleads: false,
                    reservation: Reservation::new(&index, pending.len()),
                    mappings: pending,
                },
            ),
            bounds: options.bounds,
            broken: AtomicBool::new(false),
            sealed: AtomicBool::new(false),
            tickets: AtomicU64::new(0),
            flush: RankedMutex::new(
                Rank::Flush,
                Flusher {
                    index,
                    rewrite,
                    retry_at: 0,
                    done: 0,
                    files_may_have_other_size: false,
                },
            ),
            header: ArcSwap::from_pointee(header),
        })
    }

    /// Makes writes of an earlier process durable, and the index agree with the map. Without space, the next flush does
    /// that, unless the index must be rewritten first.
    fn catch_up(&self, rewrite: Rewrite) -> Result<(), Error> {
        match self.flush() {
            Err(error) if error.is_full() && rewrite != Rewrite::Needed => {
                ratelimited_log::warn(format_args!(
                    "{error}: no space for the index; writes of an earlier run stay in the \
                     journal until a flush succeeds"
                ));
                Ok(())
            }
            flushed => flushed,
        }
    }
}

/// The allocator of a data file that holds the extents of `map`, and the end of the data in use. With `withhold`,
/// nothing is free before the first flush.
fn find_space(
    paths: &Paths,
    data: &File,
    map: &ExtentMap,
    limit: u64,
    withhold: bool,
) -> Result<(Allocator, Sector), Error> {
    let data_of = |extent: Extent| extent.data();
    let mut used: Vec<_> = map.iter().filter_map(data_of).collect();
    used.sort_unstable_by_key(|range| range.start());
    let data_end = used.last().map_or(Sector(0), |range| range.end());
    let metadata = data.metadata();
    let metadata = metadata.map_err(Error::file("examine", &paths.data))?;
    let is_suspect = takes_more(&metadata, &used);
    let mut allocator = Allocator::new(FIRST_DATA, used, Sectors::whole_in(limit));
    allocator.extend(Sector::at_or_after(metadata.len()));
    if is_suspect {
        allocator.suspect_all();
    }
    if withhold {
        allocator.withhold();
    }
    Ok((allocator, data_end))
}

/// Returns the end of the disk. Gives a layer that has no size the default one.
fn determine_size(
    paths: &Paths,
    default_size: Option<u64>,
    loaded: &mut LoadedLayer,
) -> Result<Sector, Error> {
    if loaded.header().virtual_size == 0
        && let Some(size) = default_size
    {
        loaded.set_size(paths, size)?;
    }
    let size = loaded.header().virtual_size;
    match Sectors::to_hold(size) {
        sectors if size > 0 && sectors <= MAX_SECTORS => Ok(Sector(0) + sectors),
        _ => Err(Error::Size(size)),
    }
}

/// Whether a data file takes more storage than the pages that hold `used`, which is sorted, by more than a file
/// system needs for itself. Then an earlier process may have freed pages without punching them.
fn takes_more(metadata: &Metadata, used: &[SectorRange]) -> bool {
    const SLACK: u64 = 1 << 20;
    // Page 0 is the header.
    let mut taken = PAGE;
    let mut done = Sector(0) + PAGE;
    for range in used {
        let pages = SectorRange::new(
            range.start().round_down(PAGE).max(done),
            range.end().round_up(PAGE),
        );
        taken += pages.len();
        done = done.max(pages.end());
    }
    metadata.blocks() * 512 > taken.bytes() + SLACK
}
