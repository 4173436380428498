//! An image under its uppers: what a device serves.
//!
//! At most one upper is written to, the *active* one. Those below it are *frozen*: each was the
//! active one until a snapshot put a new one above it. The image itself never changes.

use std::sync::Arc;

use arc_swap::ArcSwap;

use super::overlay::{MAX_SPANS, Overlay, SpanContent};
use super::{Error, Upper};
use crate::image::Image;
use crate::image::reader::Reader;
use crate::scatter::Cursor;
use crate::units::{ByteOffset, SECTOR_SIZE, Sector};

/// The uppers of a moment, topmost first; the first one is active.
type Uppers = Vec<Arc<Upper>>;

/// A disk. Shared by everybody who serves it.
#[derive(Debug)]
pub struct Volume {
    image: Image,
    /// Without it, the disk is read-only.
    uppers: Option<ArcSwap<Uppers>>,
    size: u64,
}

impl Volume {
    /// An image that nobody writes to.
    pub fn read_only(image: Image) -> Self {
        Self {
            size: image.size(),
            image,
            uppers: None,
        }
    }

    /// An image under uppers, the topmost and active one first; those after it are never written
    /// to. The disk is as large as the active one says.
    pub fn writable(image: Image, uppers: Vec<Upper>) -> Self {
        let uppers: Uppers = uppers.into_iter().map(Arc::new).collect();
        let active = uppers.first();
        let size = active.map_or(image.size(), |upper| upper.header().virtual_size);
        Self {
            size,
            // As it will be when the uppers are layers.
            image: image.with_size(size),
            uppers: (!uppers.is_empty()).then(|| ArcSwap::from_pointee(uppers)),
        }
    }

    /// The layers below the uppers.
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// Whether it can be written to.
    pub fn is_writable(&self) -> bool {
        self.uppers.is_some()
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Size of the disk in sectors.
    pub fn sectors(&self) -> Sector {
        ByteOffset(self.size).sectors_up()
    }

    /// Fills `into` with the parts that make up `sectors` sectors of the disk from `start` on, or
    /// the first of them if there are many, and leaves it empty if all of them lie in the image.
    /// Takes no lock then. What an earlier call named stays held.
    #[inline]
    pub fn overlay(&self, start: Sector, sectors: u64, into: &mut Overlay) {
        into.spans.clear();
        let Some(uppers) = &self.uppers else { return };
        if sectors == 0 {
            return;
        }
        for upper in uppers.load().iter() {
            if upper.may_hold(start.0, sectors) {
                lay(upper, start.0, sectors, into);
            }
        }
        let lower = |content| matches!(content, SpanContent::Lower);
        if into.spans.iter().all(|span| lower(span.content)) {
            into.spans.clear();
        }
    }

    /// Writes what comes next of `data` to `sectors` sectors of the disk from `start` on.
    ///
    /// # Errors
    /// As [`Upper::write`]; or the disk is read-only.
    pub fn write(&self, start: Sector, sectors: u64, data: Cursor<'_, '_>) -> Result<(), Error> {
        self.change(|upper| upper.write(start.0, sectors, data))
    }

    /// As [`Volume::write`], but never waits for storage.
    ///
    /// # Errors
    /// As [`Upper::write_now`]; or the disk is read-only.
    pub fn write_now(
        &self,
        start: Sector,
        sectors: u64,
        data: Cursor<'_, '_>,
    ) -> Result<(), Error> {
        self.change(|upper| upper.write_now(start.0, sectors, data))
    }

    /// Makes sectors of the disk, [`MAX_STEP`](super::MAX_STEP) or fewer, read as zeros, and gives
    /// back what they took.
    ///
    /// # Errors
    /// As [`Upper::write`]; or the disk is read-only.
    pub fn discard(&self, start: Sector, sectors: u64) -> Result<(), Error> {
        self.change(|upper| upper.discard(start.0, sectors))
    }

    /// Makes sectors of the disk, [`MAX_STEP`](super::MAX_STEP) or fewer, read as zeros; with
    /// `unmap`, gives back what they took.
    ///
    /// # Errors
    /// As [`Upper::write`]; or the disk is read-only.
    pub fn write_zeroes(&self, start: Sector, sectors: u64, unmap: bool) -> Result<(), Error> {
        self.change(|upper| match unmap {
            true => upper.discard(start.0, sectors),
            false => upper.write_zeroes(start.0, sectors),
        })
    }

    /// Makes all writes answered so far durable. Waits for storage.
    ///
    /// # Errors
    /// As [`Upper::flush`].
    pub fn flush(&self) -> Result<(), Error> {
        let Some(uppers) = &self.uppers else {
            return Ok(());
        };
        // Frozen ones first: they may have been active when what they hold was answered.
        uppers
            .load()
            .iter()
            .rev()
            .try_for_each(|upper| upper.flush())
    }

    /// Fills `into` with sectors of the disk from `start` on, and waits for storage: for tools and
    /// tests.
    ///
    /// # Errors
    /// The bytes cannot be read or unpacked.
    pub fn read(&self, reader: &mut Reader, start: Sector, into: &mut [u8]) -> Result<(), Error> {
        let mut overlay = Overlay::default();
        let (mut at, mut rest) = (start, into);
        while !rest.is_empty() {
            self.overlay(at, rest.len() as u64 / SECTOR_SIZE, &mut overlay);
            if overlay.is_empty() {
                return Ok(reader.read(&self.image, at, rest)?);
            }
            for span in overlay.spans() {
                // Part of a slice's length.
                let (part, later) = rest.split_at_mut((span.sectors * SECTOR_SIZE) as usize);
                match span.content {
                    SpanContent::Lower => reader.read(&self.image, at, part)?,
                    SpanContent::Zero => part.fill(0),
                    SpanContent::Data { file, offset } => {
                        overlay.file(file).read_exact_at(part, offset)?;
                    }
                }
                (at, rest) = (Sector(at.0 + span.sectors), later);
            }
        }
        Ok(())
    }

    /// Does `what` to the active upper, again if that was frozen meanwhile.
    fn change(&self, what: impl Fn(&Upper) -> Result<(), Error>) -> Result<(), Error> {
        let uppers = self.uppers.as_ref().ok_or(Error::ReadOnly)?;
        loop {
            let now = uppers.load_full();
            let active = now.first().ok_or(Error::ReadOnly)?;
            match what(active) {
                // Another stands above it by now.
                Err(Error::Frozen) => {}
                done => return done,
            }
        }
    }

    /// Puts `next`, an empty upper, above the active one, which is only read from then on, once
    /// `commit` has done what makes that last. Writes wait meanwhile. If the inner result of
    /// `commit` is an error, `next` stands there, but takes no writes: they might not last.
    ///
    /// # Errors
    /// What `commit` says, or the disk is read-only; then all is as before.
    pub fn freeze(
        &self,
        next: Upper,
        commit: impl FnOnce() -> Result<Result<(), Error>, Error>,
    ) -> Result<Result<(), Error>, Error> {
        let uppers = self.uppers.as_ref().ok_or(Error::ReadOnly)?;
        let now = uppers.load_full();
        let active = now.first().ok_or(Error::ReadOnly)?;
        active.freeze(|| {
            let settled = commit()?;
            if settled.is_err() {
                next.give_up();
            }
            let next = [Arc::new(next)].into_iter();
            uppers.store(Arc::new(next.chain(now.iter().cloned()).collect()));
            Ok(settled)
        })
    }

    /// The uppers of this moment, topmost first.
    pub fn uppers(&self) -> Arc<Vec<Arc<Upper>>> {
        let uppers = self.uppers.as_ref();
        uppers.map(ArcSwap::load_full).unwrap_or_default()
    }
}

/// Puts what `upper` holds of a range under what is in `into` already, as far as there is room.
fn lay(upper: &Upper, start: u64, sectors: u64, into: &mut Overlay) {
    let mut file = None;
    if into.spans.is_empty() {
        return upper.spans(start, sectors, into, &mut file);
    }
    let mut at = start;
    for span in std::mem::take(&mut into.spans) {
        let before = into.spans.len();
        match span.content {
            _ if before >= MAX_SPANS => return,
            SpanContent::Lower => upper.spans(at, span.sectors, into, &mut file),
            _ => into.spans.push(span),
        }
        let covered: u64 = into.spans[before..].iter().map(|span| span.sectors).sum();
        if covered < span.sectors {
            return;
        }
        at += span.sectors;
    }
}
