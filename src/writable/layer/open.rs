//! Opening a writable layer to write to it.
//!
//! What a process before us answered for and did not flush is in its journal. It is entered in the
//! index, which is made durable, and the journal starts anew. Where storage has no room for that, the
//! journal is gone on with, and its mappings wait for the next flush like those to come.

use std::fs::{File, Metadata};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicBool, AtomicU64};

use super::super::allocator::{Allocator, PAGE};
use super::super::coverage::Coverage;
use super::super::data_file::DataFile;
use super::super::extent_map::{ExtentMap, Place};
use super::super::journal::{self, IndexPosition, Journal};
use super::super::load::{Access, Loaded, load};
use super::super::locks::{Rank, RankedMutex, RankedRwLock};
use super::super::reservation::Reservation;
use super::super::{Error, Options, Paths, WritableLayer};
use super::flush::is_long;
use super::{Flusher, Pending, Placement, Rewrite};
use crate::format::lsmt::writable::{Kind, encode_data_header};
use crate::format::lsmt::{FIRST_DATA, MAX_ENTRIES, MAX_SECTORS};
use crate::units::{SECTOR_SIZE, Sector};

impl WritableLayer {
    /// Opens a layer to write to it. What its journal holds is made durable first, if there is room.
    ///
    /// # Errors
    /// The files cannot be read, or written; somebody else has them open; they are damaged.
    pub fn open(paths: &Paths, options: &Options) -> Result<Self, Error> {
        let mut loaded = load(paths, Access::Write, ExtentMap::new())?;
        if loaded.kind == Kind::Sparse && options.limit != u64::MAX {
            return Err(Error::NoLimit {
                path: paths.data.clone(),
            });
        }
        let sectors = settle_size(paths, options, &mut loaded)?;
        if loaded.map.mappings() > MAX_ENTRIES {
            return Err(Error::Fragmented {
                path: paths.data.clone(),
                most: MAX_ENTRIES,
            });
        }
        let rewrite = match &loaded {
            loaded if loaded.index_misleads => Rewrite::Needed,
            loaded if loaded.index_is_stale => Rewrite::Wanted,
            loaded if is_long(&loaded.log, &loaded.map, options.log_slack) => Rewrite::Wanted,
            _ => Rewrite::No,
        };
        loaded.log.trim()?;
        let journal = open_journal(paths, &loaded)?;
        let layer = Self::build(paths, options, loaded, (sectors, rewrite, journal))?;
        layer.catch_up(rewrite)?;
        Ok(layer)
    }

    fn build(
        paths: &Paths,
        options: &Options,
        loaded: Loaded,
        (sectors, rewrite, journal): (u64, Rewrite, Journal),
    ) -> Result<Self, Error> {
        let Loaded {
            data,
            log: index,
            header,
            kind,
            map,
            journal: pending,
            ..
        } = loaded;
        let coverage = Coverage::new(sectors);
        let withhold = !pending.is_empty() || rewrite != Rewrite::No;
        let (placement, end) = place(paths, &data, map, &coverage, options.limit, withhold)?;
        Ok(Self {
            paths: paths.clone(),
            kind,
            data: DataFile::new(&paths.data, data, end)?,
            limit: options.limit,
            coverage,
            gate: RankedRwLock::new(Rank::Freeze, false),
            placement: RankedRwLock::new(Rank::Map, placement),
            pending: RankedMutex::new(
                Rank::Pending,
                Pending {
                    journal,
                    journal_misleads: false,
                    reservation: Reservation::new(&index, pending.len()),
                    mappings: pending,
                },
            ),
            max_pending: options.max_pending,
            log_slack: options.log_slack,
            max_log: options.max_log,
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
                },
            ),
            header,
        })
    }

    /// Makes durable what a process before this one answered for, and the index say what the map says.
    /// Without room for that it waits for the next flush, unless the index misleads.
    fn catch_up(&self, rewrite: Rewrite) -> Result<(), Error> {
        match self.flush() {
            // Storage without room for the data itself has lost it.
            Err(error) if error.is_full() && rewrite != Rewrite::Needed && !self.is_broken() => {
                ::log::warn!(
                    "{error}: no space for the index; writes of an earlier run stay in the journal until a \
         flush succeeds"
                );
                Ok(())
            }
            flushed => flushed,
        }
    }
}

/// Goes on with a journal that has mappings the index need not hold; else starts a new one.
fn open_journal(paths: &Paths, loaded: &Loaded) -> Result<Journal, Error> {
    let (uuid, boot) = (loaded.header.uuid, journal::boot_id());
    let entries = loaded.log.entries();
    match loaded.journal.is_empty() {
        true => Journal::start(&paths.index, uuid, boot, entries),
        false => {
            let position = IndexPosition {
                next: loaded.next,
                entries: Some(entries),
            };
            Journal::resume(&paths.index, uuid, boot, position)
        }
    }
}

/// Marks in `coverage` what a map holds, and finds the free space of the data file; returns the end of the
/// data in use, too. With `withhold`, nothing is free before the first flush.
fn place(
    paths: &Paths,
    data: &File,
    map: ExtentMap,
    coverage: &Coverage,
    limit: u64,
    withhold: bool,
) -> Result<(Placement, Sector), Error> {
    let mut used = Vec::new();
    for extent in map.iter() {
        coverage.set(extent.start, extent.len);
        if let Place::Data(at) = extent.place {
            used.push(at..at + extent.len);
        }
    }
    used.sort_unstable_by_key(|range| range.start);
    let end = Sector(used.last().map_or(0, |range| range.end));
    let metadata = data.metadata();
    let metadata = metadata.map_err(Error::file("examine", &paths.data))?;
    let suspect = takes_more(&metadata, &used);
    let mut space = Allocator::new(FIRST_DATA.0, used, limit / SECTOR_SIZE);
    space.extend(metadata.len().div_ceil(SECTOR_SIZE));
    if suspect {
        space.suspect_all();
    }
    if withhold {
        space.withhold();
    }
    Ok((Placement { map, space }, end))
}

/// Gives a layer a size if it has none yet; returns that of the disk in sectors.
fn settle_size(paths: &Paths, options: &Options, loaded: &mut Loaded) -> Result<u64, Error> {
    if loaded.header.virtual_size == 0 {
        loaded.header.virtual_size = options.default_size;
        let header = encode_data_header(&loaded.header, loaded.kind);
        let written = loaded.data.write_all_at(&header, 0);
        written.map_err(Error::bytes("write", &paths.data, 0))?;
        (loaded.index_is_stale, loaded.index_misleads) = (true, true);
    }
    let sectors = loaded.header.virtual_size.div_ceil(SECTOR_SIZE);
    match sectors {
        1..=MAX_SECTORS => Ok(sectors),
        _ => Err(Error::Size(loaded.header.virtual_size)),
    }
}

/// Whether a data file takes more storage than the pages that these sectors lie on, sorted, by more
/// than a file system needs for itself. What a process before this one freed may not be punched then.
fn takes_more(metadata: &Metadata, used: &[Range<u64>]) -> bool {
    const SLACK: u64 = 1 << 20;
    let (mut pages, mut last) = (0, 0);
    for range in used {
        // Page 0 is the header.
        let first = (range.start / PAGE).max(last + 1);
        let end = range.end.div_ceil(PAGE);
        pages += end.saturating_sub(first);
        last = last.max(end - 1);
    }
    metadata.blocks() * 512 > (pages + 1) * PAGE * SECTOR_SIZE + SLACK
}
