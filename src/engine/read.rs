//! Serves the parts of reads: from memory at once, from storage later.
//!
//! Bytes that are in memory are copied once, from the mapped blob: plain ones into the guest,
//! packed ones into a buffer of the worker's own, so that what is checked is what is decoded, and
//! from there decoded into the guest. Others are read by io_uring, while the worker goes on; where
//! there is none, the worker reads and waits.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use super::Disk;
use super::drop_behind::DropBehind;
use super::task::{Part, Task};
use super::uring::{Completion, MAX_READS, Uring};
use crate::image::plan::{CompressedRun, Piece};
use crate::image::unpack::Unpacker;
use crate::image::{Error, Image, MAX_STORED};
use crate::io::prefetch;
use crate::io::scatter::Cursor;
use crate::source::{FetchError, FetchErrorKind, Located, PresentRange};
use crate::writable::Lookup;

/// Reads of one task under way at a time, so that a large one leaves room for others.
const MAX_READS_PER_TASK: usize = 16;

/// Cache lines of a request's memory that are fetched ahead: the hardware follows from there.
const TARGET_LINES: usize = 4;

/// What became of a task's parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// All are served or under way.
    Begun,
    /// As many reads are under way as may be, in all or for this task: go on when one has finished.
    Stalled,
}

/// The stored bytes that `part` needs; zeros need none.
///
/// # Errors
/// They are not local.
fn stored<'t>(
    part: &Part,
    image: &'t Image,
    lookup: &'t Lookup,
) -> Result<Option<PresentRange<'t>>, Error> {
    let (blob, offset, len) = match part {
        Part::Lower(piece) => {
            let (layer, offset, len) = match piece {
                Piece::Zero { .. } => return Ok(None),
                Piece::Plain { layer, offset, len } => (*layer, *offset, *len as usize),
                Piece::Compressed(packed) => (packed.layer, packed.offset, packed.stored as usize),
            };
            (image.container(layer).blob(), offset, len)
        }
        Part::Upper { file, offset, len } => (&**lookup.file(*file), *offset, *len as usize),
    };
    match blob.locate(offset, len) {
        Located::Present(range) => Ok(Some(range)),
        Located::Absent(range) => {
            let reason = "requests do not wait for absent bytes yet";
            Err(range
                .error(FetchError::new(FetchErrorKind::System, reason))
                .into())
        }
    }
}

/// A part whose bytes are being read.
#[derive(Debug)]
struct Waiting {
    slot: u16,
    position: usize,
    part: Part,
    filled: usize,
}

/// A worker's means of reading.
pub struct Fetcher<'a> {
    image: &'a Image,
    unpacker: Unpacker,
    /// Stored bytes of the part at hand, private while they are checked and decoded.
    buffer: Vec<u8>,
    uring: Option<Uring>,
    /// Lets pages go once their bytes are served, if asked to.
    drop_behind: Option<DropBehind<'a>>,
    /// What the ring's reads are for, by id.
    waiting: Vec<Option<Waiting>>,
}

impl<'a> Fetcher<'a> {
    /// Means that read cold bytes through `uring`, or wait for them without one.
    pub fn new(disk: &'a Disk, uring: Option<Uring>) -> Self {
        Self {
            image: disk.volume.image(),
            unpacker: Unpacker::with_cache(disk.cache.clone()),
            buffer: vec![0; MAX_STORED],
            uring,
            drop_behind: disk.tuning.drop_cache.then(DropBehind::default),
            waiting: (0..MAX_READS).map(|_| None).collect(),
        }
    }

    /// The ring's descriptor, readable when a read has finished.
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.uring.as_ref().map(AsFd::as_fd)
    }

    /// Whether reads are under way.
    pub fn is_waiting(&self) -> bool {
        self.uring
            .as_ref()
            .is_some_and(|uring| uring.under_way() > 0)
    }

    /// Starts to find the pages of the first bytes a task will need.
    pub fn prefetch_pages(&self, task: &mut Task<'a>) {
        if let Some(range) = self.first(task) {
            range.prefetch_pages();
        }
    }

    /// Starts to bring the first bytes a task will need closer, and where they go.
    pub fn prefetch(&self, task: &mut Task<'a>) {
        if let Some(range) = self.first(task) {
            range.prefetch();
        }
        if let Some(first) = task.chain.writable().pieces().first() {
            prefetch::start(*first, TARGET_LINES);
        }
    }

    fn first<'t>(&'t self, task: &'t mut Task<'a>) -> Option<PresentRange<'t>> {
        let (part, _) = task.peek()?;
        stored(&part, self.image, &task.lookup).ok().flatten()
    }

    /// Serves what can be served of the task in `slot`, and begins to read the rest.
    ///
    /// # Errors
    ///
    /// The part that failed; the task is abandoned, but reads of it may still be under way.
    pub fn serve(&mut self, slot: u16, task: &mut Task<'a>) -> Result<Progress, Error> {
        let result = self.serve_parts(slot, task);
        if result.is_err() {
            task.abandon();
        }
        result
    }

    fn serve_parts(&mut self, slot: u16, task: &mut Task<'a>) -> Result<Progress, Error> {
        while let Some((part, position)) = task.peek() {
            let mut cursor = task.chain.writable().cursor(position);
            let Some(range) = stored(&part, self.image, &task.lookup)? else {
                cursor.zero(part.len() as usize);
                task.take(&part);
                continue;
            };
            if self.serve_mapped(&part, range, cursor)? {
                task.take(&part);
                continue;
            }
            if task.outstanding >= MAX_READS_PER_TASK {
                return Ok(Progress::Stalled);
            }
            if !self.serve_read(&part, range, cursor)?
                && let Some(uring) = &mut self.uring
            {
                let Some(id) = uring.free_id() else {
                    return Ok(Progress::Stalled);
                };
                let buffer = uring.buffer(range.len());
                uring
                    .read(id, range.descriptor(), range.offset(), buffer, 0)
                    .map_err(|error| range.failed(error))?;
                task.outstanding += 1;
                self.waiting[id] = Some(Waiting {
                    slot,
                    position,
                    part,
                    filled: 0,
                });
            }
            task.take(&part);
        }
        Ok(Progress::Begun)
    }

    /// Serves a part from the mapped blob, if that is known to be in memory.
    fn serve_mapped(
        &mut self,
        part: &Part,
        range: PresentRange<'_>,
        mut cursor: Cursor<'_, '_>,
    ) -> Result<bool, Error> {
        let (blob, len) = (range.blob(), range.len());
        if let Part::Lower(Piece::Compressed(packed)) = part
            && self
                .unpacker
                .unpack_held(self.image.container(packed.layer), packed, &mut cursor)
        {
            return Ok(true);
        }
        let Some(mapped) = range.resident() else {
            return Ok(false);
        };
        match part {
            Part::Lower(Piece::Compressed(packed)) => {
                let bytes = &mut self.buffer[..len];
                mapped.copy_to(bytes);
                // Cut under its mapping: this is not the file's content. Read it.
                if blob.is_lost() {
                    return Ok(false);
                }
                let container = self.image.container(packed.layer);
                self.unpacker
                    .unpack(container, packed, bytes, &mut cursor)?;
                Ok(true)
            }
            _ => {
                let mut at = 0;
                cursor.take(len, |target| {
                    if let Ok(source) = mapped.offset(at) {
                        source.copy_to_volatile_slice(target);
                    }
                    at += target.len();
                });
                Ok(!blob.is_lost())
            }
        }
    }

    /// Serves a part by a read that does not wait, or, without a ring, by one that does.
    fn serve_read(
        &mut self,
        part: &Part,
        range: PresentRange<'_>,
        cursor: Cursor<'_, '_>,
    ) -> Result<bool, Error> {
        let bytes = &mut self.buffer[..range.len()];
        if self.uring.is_none() {
            range.read_exact(bytes)?;
        } else if !range.read_cached(bytes)? {
            return Ok(false);
        }
        settle(&mut self.drop_behind, self.image, part, range);
        place(&mut self.unpacker, self.image, part, bytes, cursor)?;
        Ok(true)
    }

    /// Whether one more read can be begun.
    pub fn has_room(&self) -> bool {
        self.uring
            .as_ref()
            .is_none_or(|uring| uring.free_id().is_some())
    }

    /// Whether reads were prepared that could not be started yet.
    pub fn is_backlogged(&mut self) -> bool {
        self.uring.as_mut().is_some_and(Uring::is_backlogged)
    }

    /// Goes on without the ring, which failed: from now on the worker reads and waits. Serves one
    /// part the ring was to read; returns as [`Fetcher::complete`] does, until none is left.
    pub fn fall_back(&mut self, tasks: &mut [Task<'a>]) -> Option<(u16, Result<(), Error>)> {
        if let Some(uring) = self.uring.take() {
            uring.abandon();
        }
        let Waiting {
            slot,
            position,
            part,
            ..
        } = self.waiting.iter_mut().find_map(Option::take)?;
        let task = &mut tasks[usize::from(slot)];
        let outcome = match stored(&part, self.image, &task.lookup) {
            Err(error) => Err(error),
            Ok(None) => Ok(()),
            Ok(Some(range)) => {
                let cursor = task.chain.writable().cursor(position);
                self.serve_read(&part, range, cursor).map(|_| ())
            }
        };
        task.outstanding -= 1;
        Some((slot, outcome))
    }

    /// Starts the reads that were prepared.
    pub fn submit(&mut self) -> io::Result<()> {
        self.uring.as_mut().map_or(Ok(()), Uring::submit)
    }

    /// Waits until a read finishes.
    pub fn wait(&mut self) -> io::Result<()> {
        self.uring.as_mut().map_or(Ok(()), Uring::wait)
    }

    /// Takes one finished read and puts its bytes in place; returns the slot of its task, which
    /// has one read less outstanding, and how it went.
    pub fn complete(&mut self, tasks: &mut [Task<'a>]) -> Option<(u16, Result<(), Error>)> {
        loop {
            let uring = self.uring.as_mut()?;
            let Completion { id, result, buffer } = uring.completed()?;
            let waiting = self.waiting.get_mut(id).and_then(Option::take);
            let Some(mut waiting) = waiting else { continue };
            let slot = waiting.slot;
            let task = &mut tasks[usize::from(slot)];
            let range = stored(&waiting.part, self.image, &task.lookup);
            // Zeros are not read, and what was read is present.
            let Ok(Some(range)) = range else { continue };
            let outcome = match result {
                Ok(0) => Err(range.short(waiting.filled)),
                Ok(read) => {
                    waiting.filled += read;
                    Ok(())
                }
                Err(error) if is_passing(&error) => Ok(()),
                Err(error) => Err(range.failed(error)),
            };
            let filled = waiting.filled;
            let outcome = match outcome {
                Err(error) => Err(error.into()),
                Ok(()) if filled < range.len() => {
                    let at = range.offset() + filled as u64;
                    match uring.read(id, range.descriptor(), at, buffer, filled) {
                        Ok(()) => {
                            self.waiting[id] = Some(waiting);
                            continue;
                        }
                        Err(error) => Err(range.failed(error).into()),
                    }
                }
                Ok(()) => {
                    let (image, part) = (self.image, &waiting.part);
                    settle(&mut self.drop_behind, image, part, range);
                    let cursor = task.chain.writable().cursor(waiting.position);
                    let placed = place(&mut self.unpacker, image, part, &buffer, cursor);
                    uring.recycle(buffer);
                    placed
                }
            };
            task.outstanding -= 1;
            return Some((slot, outcome));
        }
    }
}

fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
    )
}

/// Notes that a part's bytes were read and are in memory, or that they need not stay there. What
/// an upper holds changes, and is left to the kernel.
fn settle<'a>(
    drop: &mut Option<DropBehind<'a>>,
    image: &'a Image,
    part: &Part,
    range: PresentRange<'_>,
) {
    let (Part::Lower(Piece::Plain { layer, .. })
    | Part::Lower(Piece::Compressed(CompressedRun { layer, .. }))) = part
    else {
        return;
    };
    match drop {
        Some(drop) => {
            let blob = image.container(*layer).blob();
            drop.read(blob, range.offset(), range.len() as u64);
        }
        None => range.note(),
    }
}

/// Puts the stored bytes of a part where they belong.
fn place(
    unpacker: &mut Unpacker,
    image: &Image,
    part: &Part,
    bytes: &[u8],
    mut cursor: Cursor<'_, '_>,
) -> Result<(), Error> {
    match part {
        Part::Lower(Piece::Compressed(packed)) => {
            unpacker.unpack(image.container(packed.layer), packed, bytes, &mut cursor)
        }
        _ => {
            cursor.write(bytes);
            Ok(())
        }
    }
}
