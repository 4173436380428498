//! A writable layer in use.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::journal::{self, Journal};
use super::load::{Access, Loaded, load};
use super::log::{Log, sync_folder_of};
use super::map::{Extent, ExtentMap, Place};
use super::overlay::{Overlay, Span, SpanContent};
use super::space::{Hold, Space};
use super::touched::Touched;
use super::{Error, Paths};
use crate::format::lsmt::writable::{Kind, encode_data_header};
use crate::format::lsmt::{FIRST_DATA, HEADER_LEN, Header, MAX_LENGTH, MAX_SECTORS, Mapping};
use crate::scatter::Cursor;
use crate::source::{Blob, gather};
use crate::units::{SECTOR_SIZE, Sector};

/// Most sectors of a mapping of data, as upstream writes them: 4 MiB.
const MAX_DATA: u64 = 8192;

/// Mappings that wait for a flush at most: with that many, a write flushes first.
const MAX_PENDING: usize = 1 << 20;

/// A log is written anew when it has twice the entries that its map needs, and this many more.
const LOG_SLACK: u64 = 1 << 16;

/// How an upper is used.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Most bytes of data it may hold.
    pub limit: u64,
    /// Size of the disk in bytes, for an upper that does not say it.
    pub default_size: u64,
}

/// Makes the files of an empty layer, durable and under their names.
///
/// # Errors
/// A file of either name exists, or cannot be written; the size is impossible.
pub fn create(paths: &Paths, kind: Kind, header: &Header) -> Result<(), Error> {
    let size = header.virtual_size;
    let whole = size.is_multiple_of(SECTOR_SIZE) && size / SECTOR_SIZE <= MAX_SECTORS;
    if size == 0 || !whole {
        return Err(Error::Size(size));
    }
    let path = &paths.data;
    let file = File::options().write(true).create_new(true).open(path);
    let file = file.map_err(Error::file("create", path))?;
    file.write_all_at(&encode_data_header(header, kind), 0)
        .map_err(Error::bytes("write", path, 0))?;
    if kind == Kind::Sparse {
        let len = size + HEADER_LEN as u64;
        file.set_len(len).map_err(Error::file("enlarge", path))?;
    }
    file.sync_all().map_err(Error::file("sync", path))?;
    Log::create(&paths.index, header)?;
    sync_folder_of(path)?;
    sync_folder_of(&paths.index)
}

/// A writable layer, open. Any number of threads read and write it.
#[derive(Debug)]
pub struct Upper {
    paths: Paths,
    header: Header,
    kind: Kind,
    file: File,
    blob: Arc<Blob>,
    limit: u64,
    touched: Touched,
    /// Held by every change while it is under way, and by who lets no more of them begin. Whether
    /// that is so.
    gate: RwLock<bool>,
    state: RwLock<State>,
    /// Whether data was written since the last sync began.
    dirty: AtomicBool,
    /// Storage lost something.
    broken: AtomicBool,
    /// Flushes asked for so far.
    asked: AtomicU64,
    flush: Mutex<Flusher>,
}

/// What changes with every mapping.
#[derive(Debug)]
struct State {
    map: ExtentMap,
    space: Space,
    journal: Journal,
    /// What is in the journal and not in the index.
    pending: Vec<Mapping>,
}

/// Who makes things durable; one at a time.
#[derive(Debug)]
struct Flusher {
    log: Log,
    /// Flushes asked for that the last successful one did for.
    done: u64,
}

/// Part of a write: where it goes.
struct Target {
    start: u64,
    len: u64,
    at: u64,
    /// Whether a mapping must be made for it.
    fresh: bool,
}

impl Upper {
    /// Opens a layer to write to it. What its journal holds is made durable first.
    ///
    /// # Errors
    /// The files cannot be read, or written; somebody else has them open; they are damaged.
    pub fn open(paths: &Paths, options: &Options) -> Result<Self, Error> {
        let loaded = load(paths, Access::Write, ExtentMap::new())?;
        let Loaded {
            data,
            mut log,
            mut header,
            kind,
            map,
            journal: late,
            mut index_is_stale,
        } = loaded;
        if kind == Kind::Sparse && options.limit != u64::MAX {
            return Err(Error::NoLimit {
                path: paths.data.clone(),
            });
        }
        if header.virtual_size == 0 {
            header.virtual_size = options.default_size;
            let written = data.write_all_at(&encode_data_header(&header, kind), 0);
            written.map_err(Error::bytes("write", &paths.data, 0))?;
            index_is_stale = true;
        }
        let sectors = header.virtual_size.div_ceil(SECTOR_SIZE);
        if sectors == 0 || sectors > MAX_SECTORS {
            return Err(Error::Size(header.virtual_size));
        }
        data.sync_all().map_err(Error::file("sync", &paths.data))?;
        if index_is_stale || is_long(&log, &map) {
            log.replace(&header, mappings(&map))?;
        } else {
            log.trim()?;
            log.append(&late)?;
        }
        let journal = Journal::start(&paths.index, header.uuid, journal::boot_id()?)?;
        let touched = Touched::new(sectors);
        let mut used = Vec::new();
        for extent in map.iter() {
            touched.set(extent.start, extent.len);
            if let Place::Data(at) = extent.place {
                used.push(at..at + extent.len);
            }
        }
        used.sort_unstable_by_key(|range| range.start);
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
            state: RwLock::new(State {
                space: Space::new(FIRST_DATA.0, used, options.limit / SECTOR_SIZE),
                map,
                journal,
                pending: Vec::new(),
            }),
            dirty: AtomicBool::new(false),
            broken: AtomicBool::new(false),
            asked: AtomicU64::new(0),
            flush: Mutex::new(Flusher { log, done: 0 }),
            header,
        })
    }

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

    /// Extents of its map.
    pub fn extents(&self) -> usize {
        self.state().map.len()
    }

    /// Whether it may hold some of `sectors` sectors, at least 1, from `start` on. Takes no lock.
    #[inline]
    pub fn may_hold(&self, start: u64, sectors: u64) -> bool {
        self.touched.any(start, sectors)
    }

    /// Appends the spans that make up a range to `into`; what it does not hold lies below. `file`
    /// is the number of its data file there, once it has one.
    pub(super) fn spans(
        &self,
        start: u64,
        sectors: u64,
        into: &mut Overlay,
        file: &mut Option<u16>,
    ) {
        let end = start + sectors;
        let state = self.state();
        let mut at = start;
        let below = |from: u64, to: u64| Span {
            sectors: to - from,
            content: SpanContent::Lower,
        };
        for extent in state.map.within(start..end) {
            if extent.start > at {
                into.spans.push(below(at, extent.start));
            }
            let content = match extent.place {
                Place::Zero => SpanContent::Zero,
                Place::Data(sector) => SpanContent::Data {
                    file: *file.get_or_insert_with(|| {
                        into.files.push((self.blob.clone(), state.space.hold()));
                        // One for each upper, of which there are few.
                        (into.files.len() - 1) as u16
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

    /// Writes `sectors` sectors from `start` on, with what comes next of `data`.
    ///
    /// When it returns, the new content is what everybody reads, also a process after us; it is
    /// durable after the next [`Upper::flush`].
    ///
    /// # Errors
    /// The upper is full, broken or frozen, or the system fails. Then each sector has its old
    /// content or the new one.
    pub fn write(&self, start: u64, sectors: u64, mut data: Cursor<'_, '_>) -> Result<(), Error> {
        let gate = self.enter()?;
        self.make_room()?;
        let (targets, _hold) = self.targets(start, sectors)?;
        let written = targets.iter().try_for_each(|target| {
            let mut pieces = Vec::new();
            // A request's data is a `usize`.
            let len = (target.len * SECTOR_SIZE) as usize;
            data.take(len, |piece| pieces.push(piece));
            let offset = target.at * SECTOR_SIZE;
            let written = gather::write_all_at(&self.file, &pieces, offset);
            written.map_err(Error::bytes("write", &self.paths.data, offset))
        });
        // After the write and before its answer: a sync that began in between does not count.
        self.dirty.store(true, Ordering::Release);
        let fresh = targets.iter().filter(|target| target.fresh);
        let extents = fresh.map(|target| Extent {
            start: target.start,
            len: target.len,
            place: Place::Data(target.at),
        });
        let entered = written.and_then(|()| self.publish(extents.clone()).map(drop));
        if entered.is_err() && self.kind != Kind::Sparse {
            let mut state = self.state_mut();
            for extent in extents {
                if let Place::Data(at) = extent.place {
                    state.space.give(at..at + extent.len);
                }
            }
        }
        drop(gate);
        entered
    }

    /// Makes `sectors` sectors from `start` on read as zeros, and gives back what they took.
    ///
    /// # Errors
    /// As [`Upper::write`].
    pub fn discard(&self, start: u64, sectors: u64) -> Result<(), Error> {
        let _gate = self.enter()?;
        self.make_room()?;
        let zero = |extent: &Extent| extent.place == Place::Zero;
        // What is zero already stays; only what is between gets a mapping. What that frees must not
        // be used again before the holes are made.
        let (zeros, _hold): (Vec<_>, Hold) = {
            let state = self.state();
            let found = state.map.within(start..start + sectors).filter(zero);
            (found.collect(), state.space.hold())
        };
        let mut gaps = Vec::new();
        let mut at = start;
        for extent in &zeros {
            gaps.push(at..extent.start);
            at = extent.end();
        }
        gaps.push(at..start + sectors);
        let extents = gaps
            .into_iter()
            .filter(|gap| !gap.is_empty())
            .map(|gap| Extent {
                start: gap.start,
                len: gap.end - gap.start,
                place: Place::Zero,
            });
        let freed = self.publish(extents)?;
        for extent in freed {
            self.punch(extent);
        }
        Ok(())
    }

    /// Makes `sectors` sectors from `start` on read as zeros, and keeps what space they have.
    ///
    /// # Errors
    /// As [`Upper::write`].
    pub fn write_zeroes(&self, start: u64, sectors: u64) -> Result<(), Error> {
        let (mapped, _hold): (Vec<_>, Hold) = {
            let _gate = self.enter()?;
            let state = self.state();
            let mapped = state.map.within(start..start + sectors).collect();
            (mapped, state.space.hold())
        };
        let mut at = start;
        for extent in mapped {
            let Place::Data(place) = extent.place else {
                continue;
            };
            if at < extent.start {
                self.discard(at, extent.start - at)?;
            }
            {
                let _gate = self.enter()?;
                self.zero(place, extent.len)?;
            }
            at = extent.end();
        }
        match start + sectors {
            end if at < end => self.discard(at, end - at),
            _ => Ok(()),
        }
    }

    /// Makes durable what was written before. Callers that come while one is at it share the next.
    ///
    /// # Errors
    /// Storage fails. If it lost data it had taken, the upper is broken for good.
    pub fn flush(&self) -> Result<(), Error> {
        let mine = self.asked.fetch_add(1, Ordering::AcqRel) + 1;
        let mut flusher = self.flusher();
        if flusher.done >= mine {
            return Ok(());
        }
        self.check()?;
        let covered = self.asked.load(Ordering::Acquire);
        self.flush_all(&mut flusher)?;
        flusher.done = covered;
        Ok(())
    }

    fn flush_all(&self, flusher: &mut Flusher) -> Result<(), Error> {
        let (batch, whole) = {
            let mut state = self.state_mut();
            if !state.pending.is_empty() {
                state.journal.switch()?;
            }
            state.space.begin_flush();
            let whole = is_long(&flusher.log, &state.map).then(|| state.map.clone());
            (std::mem::take(&mut state.pending), whole)
        };
        let made = self.sync_data().and_then(|()| match whole {
            _ if batch.is_empty() => Ok(()),
            None => flusher.log.append(&batch),
            Some(map) => {
                let replaced = flusher.log.replace(&self.header, mappings(&map));
                replaced.or_else(|error| {
                    ::log::warn!("the index stays long: {error}");
                    flusher.log.append(&batch)
                })
            }
        });
        let mut state = self.state_mut();
        if let Err(error) = made {
            let later = std::mem::replace(&mut state.pending, batch);
            state.pending.extend(later);
            return Err(error);
        }
        state.space.end_flush();
        match batch.is_empty() {
            true => Ok(()),
            false => state.journal.settle(),
        }
    }

    fn sync_data(&self) -> Result<(), Error> {
        if !self.dirty.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        self.file.sync_data().map_err(|error| {
            // The system forgets what it could not write: a later sync that succeeds says nothing
            // about it.
            self.broken.store(true, Ordering::Release);
            Error::file("sync", &self.paths.data)(error)
        })
    }

    /// Waits for changes under way, and lets none begin while `commit` puts something in the
    /// layer's place. If that succeeds, the layer is only read from then on.
    pub(super) fn freeze(&self, commit: impl FnOnce() -> Result<(), Error>) -> Result<(), Error> {
        let mut frozen = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        if *frozen {
            return Err(Error::Frozen);
        }
        commit()?;
        *frozen = true;
        Ok(())
    }

    /// Begins a change, which keeps the layer from being frozen until it is over.
    fn enter(&self) -> Result<RwLockReadGuard<'_, bool>, Error> {
        self.check()?;
        let frozen = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        match *frozen {
            true => Err(Error::Frozen),
            false => Ok(frozen),
        }
    }

    fn check(&self) -> Result<(), Error> {
        match self.broken.load(Ordering::Acquire) {
            true => Err(Error::Broken {
                path: self.paths.data.clone(),
            }),
            false => Ok(()),
        }
    }

    /// Bounds what waits for a flush.
    fn make_room(&self) -> Result<(), Error> {
        match self.state().pending.len() {
            0..MAX_PENDING => Ok(()),
            _ => self.flush(),
        }
    }

    /// Where the parts of a write go: what is held in place, the rest to free sectors.
    fn targets(&self, start: u64, sectors: u64) -> Result<(Vec<Target>, Hold), Error> {
        let end = start + sectors;
        let mut targets = Vec::new();
        {
            // A disk that is full of data needs no more than a look.
            let state = self.state();
            if let Some(extent) = state.map.within(start..end).next()
                && let Place::Data(at) = extent.place
                && (extent.start, extent.len) == (start, sectors)
            {
                targets.push(Target {
                    start,
                    len: sectors,
                    at,
                    fresh: false,
                });
                return Ok((targets, state.space.hold()));
            }
        }
        let mut state = self.state_mut();
        let mut at = start;
        let State { map, space, .. } = &mut *state;
        let held = map.within(start..end);
        for extent in held {
            let Place::Data(place) = extent.place else {
                continue;
            };
            self.place(space, at..extent.start, &mut targets)?;
            targets.push(Target {
                start: extent.start,
                len: extent.len,
                at: place,
                fresh: false,
            });
            at = extent.end();
        }
        self.place(space, at..end, &mut targets)?;
        Ok((targets, space.hold()))
    }

    /// Finds space for a range; what was found already is given back if there is none.
    fn place(
        &self,
        space: &mut Space,
        range: Range<u64>,
        targets: &mut Vec<Target>,
    ) -> Result<(), Error> {
        let mut start = range.start;
        while start < range.end {
            let len = (range.end - start).min(MAX_DATA);
            let at = match self.kind {
                Kind::Sparse => Some(FIRST_DATA.0 + start),
                Kind::Append | Kind::Hybrid => space.take(len),
            };
            let Some(at) = at else {
                for target in targets.drain(..).filter(|target| target.fresh) {
                    space.give(target.at..target.at + target.len);
                }
                return Err(Error::Full {
                    path: self.paths.data.clone(),
                    limit: self.limit,
                });
            };
            targets.push(Target {
                start,
                len,
                at,
                fresh: true,
            });
            start += len;
        }
        Ok(())
    }

    /// Enters extents in journal and map; returns the data that no longer counts.
    fn publish(&self, extents: impl Iterator<Item = Extent>) -> Result<Vec<Extent>, Error> {
        let mut freed = Vec::new();
        let mut new: Vec<Mapping> = Vec::new();
        let mut published = Vec::new();
        for extent in extents {
            published.push(extent);
            new.extend(split(extent));
        }
        if new.is_empty() {
            return Ok(freed);
        }
        let mut state = self.state_mut();
        let State {
            map,
            space,
            journal,
            pending,
        } = &mut *state;
        journal.add(&new)?;
        pending.append(&mut new);
        for extent in published {
            self.touched.set(extent.start, extent.len);
            map.insert(extent, |old| {
                if let Place::Data(at) = old.place {
                    // A sparse layer has a place for every sector, used or not.
                    if self.kind != Kind::Sparse {
                        space.freed(at..at + old.len);
                    }
                    freed.push(old);
                }
            });
        }
        Ok(freed)
    }

    /// Gives the blocks of data that no longer counts back to the file system.
    fn punch(&self, extent: Extent) {
        let Place::Data(at) = extent.place else {
            return;
        };
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let (offset, len) = (at * SECTOR_SIZE, extent.len * SECTOR_SIZE);
        // A file system that cannot keeps the blocks, until they are used again.
        let _ = rustix::fs::fallocate(&self.file, flags, offset, len);
    }

    /// Fills sectors of the data file with zeros.
    fn zero(&self, at: u64, sectors: u64) -> Result<(), Error> {
        const ZEROS: [u8; 1 << 16] = [0; 1 << 16];
        let (mut offset, len) = (at * SECTOR_SIZE, sectors * SECTOR_SIZE);
        let end = offset + len;
        let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        let zeroed = match rustix::fs::fallocate(&self.file, flags, offset, len) {
            Err(Errno::OPNOTSUPP) => loop {
                let part = (end - offset).min(ZEROS.len() as u64);
                let written = self.file.write_all_at(&ZEROS[..part as usize], offset);
                offset += part;
                if written.is_err() || offset == end {
                    break written;
                }
            },
            zeroed => zeroed.map_err(io::Error::from),
        };
        self.dirty.store(true, Ordering::Release);
        zeroed.map_err(Error::bytes("zero", &self.paths.data, at * SECTOR_SIZE))
    }

    fn state(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn state_mut(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn flusher(&self) -> MutexGuard<'_, Flusher> {
        self.flush.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a log would better be written anew.
fn is_long(log: &Log, map: &ExtentMap) -> bool {
    log.entries() > 2 * map.len() as u64 + LOG_SLACK
}

/// The mappings of a whole map.
pub(super) fn mappings(map: &ExtentMap) -> impl Iterator<Item = Mapping> + '_ {
    map.iter().flat_map(split)
}

/// The mappings of an extent: as many as their length field takes.
fn split(extent: Extent) -> impl Iterator<Item = Mapping> {
    let most = u64::from(MAX_LENGTH);
    (0..extent.len.div_ceil(most)).filter_map(move |part| {
        let done = part * most;
        let (start, len) = (extent.start + done, (extent.len - done).min(most) as u16);
        let (start, first) = (Sector(start), FIRST_DATA);
        match extent.place.moved(done) {
            Place::Zero => Mapping::zeroed(start, len, first),
            Place::Data(at) => Mapping::data(start, len, Sector(at)),
        }
    })
}
