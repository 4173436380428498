//! Opening a writable layer to write to it.
//!
//! What a process before us answered for and did not flush is in its journal. It is entered in the
//! index, which is made durable, and the journal starts anew. Where storage has no room for that, the
//! journal is gone on with, and its mappings wait for the next flush like those to come.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, RwLock};

use super::allocator::Allocator;
use super::coverage::Coverage;
use super::extent_map::{ExtentMap, Place};
use super::flush::{is_long, mappings};
use super::journal::{self, Journal};
use super::layer::{Flusher, State, Waiting};
use super::load::{Access, Loaded, load};
use super::reservation::Reservation;
use super::{Error, Options, Paths, WritableLayer};
use crate::format::lsmt::writable::{Kind, encode_data_header};
use crate::format::lsmt::{FIRST_DATA, MAX_ENTRIES, MAX_SECTORS};
use crate::source::Blob;
use crate::units::SECTOR_SIZE;

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
        let data = &loaded.data;
        data.sync_all().map_err(Error::file("sync", &paths.data))?;
        if loaded.map.mappings() > MAX_ENTRIES {
            return Err(Error::Fragmented {
                path: paths.data.clone(),
                most: MAX_ENTRIES,
            });
        }
        let folded = match fold(&mut loaded, options) {
            Err(error) if error.is_full() && !loaded.index_misleads => {
                ::log::warn!("{error}: no room to make durable what was not flushed; it waits");
                false
            }
            folded => folded.map(|()| true)?,
        };
        let Loaded {
            data,
            log,
            header,
            kind,
            map,
            journal: late,
            ..
        } = loaded;
        let boot = journal::boot_id()?;
        let journal = match folded || late.is_empty() {
            true => Journal::start(&paths.index, header.uuid, boot, log.entries())?,
            false => Journal::resume(&paths.index, header.uuid, boot)?,
        };
        let pending = if folded { Vec::new() } else { late };
        let touched = Coverage::new(sectors);
        let mut used = Vec::new();
        for extent in map.iter() {
            touched.set(extent.start, extent.len);
            if let Place::Data(at) = extent.place {
                used.push(at..at + extent.len);
            }
        }
        used.sort_unstable_by_key(|range| range.start);
        let end = used.last().map_or(0, |range| range.end * SECTOR_SIZE);
        let mut space = Allocator::new(FIRST_DATA.0, used, options.limit / SECTOR_SIZE);
        if !folded {
            space.withhold(file_end(&data, paths)?);
        }
        let again = data.try_clone().map_err(Error::file("open", &paths.data))?;
        let blob = Blob::changing(&paths.data, again)?;
        Ok(Self {
            paths: paths.clone(),
            kind,
            blob: Arc::new(blob),
            file: data,
            limit: options.limit,
            touched,
            gate: RwLock::new(false),
            state: RwLock::new(State { map, space }),
            waiting: Mutex::new(Waiting {
                journal,
                room: Reservation::new(&log, pending.len()),
                pending,
            }),
            max_pending: options.max_pending,
            log_slack: options.log_slack,
            max_log: options.max_log,
            len: AtomicU64::new(end),
            dirty: AtomicBool::new(false),
            broken: AtomicBool::new(false),
            sealed: AtomicBool::new(false),
            asked: AtomicU64::new(0),
            flush: Mutex::new(Flusher {
                log,
                retry_at: 0,
                done: 0,
            }),
            header,
        })
    }
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

/// Makes the index say what the map says, durably.
fn fold(loaded: &mut Loaded, options: &Options) -> Result<(), Error> {
    let Loaded {
        log, header, map, ..
    } = loaded;
    if loaded.index_is_stale || is_long(log, map, options.log_slack) {
        match log.replace(header, mappings(map)) {
            Err(error) if !loaded.index_misleads => {
                ::log::warn!("the index stays as it is: {error}")
            }
            done => return done,
        }
    }
    log.trim()?;
    log.append(&loaded.journal)
}

/// First sector behind the data file.
fn file_end(data: &File, paths: &Paths) -> Result<u64, Error> {
    let metadata = data.metadata();
    let metadata = metadata.map_err(Error::file("examine", &paths.data))?;
    Ok(metadata.len().div_ceil(SECTOR_SIZE))
}
