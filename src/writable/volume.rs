//! An image under its writable layers: what a device serves.
//!
//! Writes go to one layer, the *active* one. The layers below it are *frozen*: each was active until a
//! snapshot put a new one above it. Sealed ones are looked up together. The image itself never changes.
//!
//! ```text
//! active layer ── frozen layers, until they are sealed ── layers sealed since the start ── image
//! ```
//!
//! A read uses the layers of one moment, without a lock.

use std::sync::{Arc, MutexGuard};
use std::thread;
use std::time::Duration;

use arc_swap::ArcSwap;

use super::locks::{Guard, Rank, RankedMutex};
use super::lookup::{Lookup, MAX_SPANS, SpanContent};
use super::sealed::SealedLayers;
use super::{Error, WritableLayer};
use crate::image::reader::Reader;
use crate::image::{Image, SizedImage};
use crate::io::scatter::Cursor;
use crate::units::{SECTOR_SIZE, Sector};

/// How long to wait for readers of replaced layers, in milliseconds.
const MAX_WAIT: u32 = 1000;

/// The layers above the image at one moment.
#[derive(Clone, Debug)]
struct Above {
    /// Topmost first; the first one is active, the others are not part of `sealed` yet.
    uppers: Vec<Arc<WritableLayer>>,
    sealed: Option<Arc<SealedLayers>>,
}

/// A disk. All its queue workers share it.
#[derive(Debug)]
pub struct Volume {
    image: Image,
    /// `None`: the disk is read-only.
    above: Option<ArcSwap<Above>>,
    /// Locked until the manifest that names the active layer is durable.
    settling: RankedMutex<()>,
    size: u64,
}

impl Volume {
    /// A read-only disk.
    pub fn read_only(image: Image) -> Self {
        Self {
            size: image.size(),
            image,
            above: None,
            settling: RankedMutex::new(Rank::Settle, ()),
        }
    }

    /// An image under writable layers, the active one first, then the frozen ones, the newest first. The
    /// disk has the size of the active one.
    pub fn writable(image: Image, uppers: Vec<WritableLayer>) -> Self {
        let uppers: Vec<_> = uppers.into_iter().map(Arc::new).collect();
        let active = uppers.first();
        let size = active.map_or(image.size(), |upper| upper.header().virtual_size);
        Self {
            size,
            image,
            above: (!uppers.is_empty()).then(|| {
                let sealed = None;
                ArcSwap::from_pointee(Above { uppers, sealed })
            }),
            settling: RankedMutex::new(Rank::Settle, ()),
        }
    }

    /// The layers below the writable ones.
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// The layers below the writable ones, as a disk of the volume's size: so they will read when the
    /// writable layers are read-only ones above them.
    #[inline]
    pub fn lower(&self) -> SizedImage<'_> {
        self.image.sized(self.size)
    }

    /// Whether the disk is writable.
    pub fn is_writable(&self) -> bool {
        self.above.is_some()
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Size of the disk in sectors.
    pub fn sectors(&self) -> Sector {
        Sector::at_or_after(self.size)
    }

    /// Fills `into` with the parts that make up `sectors` sectors of the disk from `start` on, or
    /// the first of them if there are many, and leaves it empty if all of them lie in the image.
    /// Takes no lock then. What an earlier call named stays held.
    #[inline]
    pub fn lookup(&self, start: Sector, sectors: u64, into: &mut Lookup) {
        into.spans.clear();
        let Some(above) = &self.above else { return };
        if sectors == 0 {
            return;
        }
        let above = above.load();
        for upper in &above.uppers {
            if upper.may_hold(start.0, sectors) {
                let mut file = None;
                lay(start.0, sectors, into, |start, sectors, into| {
                    upper.spans(start, sectors, into, &mut file);
                });
            }
        }
        if let Some(sealed) = &above.sealed
            && sealed.may_hold(start.0, sectors)
        {
            lay(start.0, sectors, into, |start, sectors, into| {
                sealed.spans(start, sectors, into);
            });
        }
        let lower = |content| matches!(content, SpanContent::Lower);
        if into.spans.iter().all(|span| lower(span.content)) {
            into.spans.clear();
        }
    }

    /// Writes what comes next of `data` to `sectors` sectors of the disk from `start` on.
    ///
    /// # Errors
    /// As [`WritableLayer::write`]; or the disk is read-only.
    pub fn write(&self, start: Sector, sectors: u64, data: Cursor<'_, '_>) -> Result<(), Error> {
        self.change(|upper| upper.write(start.0, sectors, data))
    }

    /// As [`Volume::write`], but never waits for storage.
    ///
    /// # Errors
    /// As [`WritableLayer::write_now`]; or the disk is read-only.
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
    /// As [`WritableLayer::write`]; or the disk is read-only.
    pub fn discard(&self, start: Sector, sectors: u64) -> Result<(), Error> {
        self.change(|upper| upper.discard(start.0, sectors))
    }

    /// Makes sectors of the disk, [`MAX_STEP`](super::MAX_STEP) or fewer, read as zeros; with
    /// `unmap`, gives back what they took.
    ///
    /// # Errors
    /// As [`WritableLayer::write`]; or the disk is read-only.
    pub fn write_zeroes(&self, start: Sector, sectors: u64, unmap: bool) -> Result<(), Error> {
        self.change(|upper| match unmap {
            true => upper.discard(start.0, sectors),
            false => upper.write_zeroes(start.0, sectors),
        })
    }

    /// Makes all writes answered so far durable. Waits for storage.
    ///
    /// # Errors
    /// As [`WritableLayer::flush`].
    pub fn flush(&self) -> Result<(), Error> {
        let Some(above) = &self.above else {
            return Ok(());
        };
        let now = above.load_full();
        // Data in a layer that the manifest may not name at the next start is not durable.
        drop(self.settling());
        // Frozen layers first: they may hold writes answered before this flush.
        let mut unsealed = now.uppers.iter().rev().filter(|upper| !upper.is_sealed());
        unsealed.try_for_each(|upper| {
            upper.flush()?;
            upper.check()
        })
    }

    /// Fills `into` with sectors of the disk from `start` on, and waits for storage: for tools and
    /// tests.
    ///
    /// # Errors
    /// The bytes cannot be read or unpacked.
    pub fn read(&self, reader: &mut Reader, start: Sector, into: &mut [u8]) -> Result<(), Error> {
        let mut overlay = Lookup::default();
        let (mut at, mut rest) = (start, into);
        while !rest.is_empty() {
            self.lookup(at, rest.len() as u64 / SECTOR_SIZE, &mut overlay);
            if overlay.is_empty() {
                return Ok(reader.read(self.lower(), at, rest)?);
            }
            for span in overlay.spans() {
                // Part of a slice's length.
                let (part, later) = rest.split_at_mut((span.sectors * SECTOR_SIZE) as usize);
                match span.content {
                    SpanContent::Lower => reader.read(self.lower(), at, part)?,
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

    /// Does `what` to the active layer; again if a snapshot froze it meanwhile.
    fn change(&self, what: impl Fn(&WritableLayer) -> Result<(), Error>) -> Result<(), Error> {
        let above = self.above.as_ref().ok_or(Error::ReadOnly)?;
        loop {
            let now = above.load_full();
            let active = now.uppers.first().ok_or(Error::ReadOnly)?;
            match what(active) {
                // Another layer is active now.
                Err(Error::Frozen) => {}
                done => return done,
            }
        }
    }

    /// Puts `next`, an empty upper, above the active one, which is only read from then on, once
    /// `commit` says that it will be found there; writes wait meanwhile. Then `settle` makes that
    /// last, for which flushes wait. If it fails, `next` takes no more writes: they might be lost.
    /// The inner result is that of `settle`.
    ///
    /// # Errors
    /// What `commit` says, or the disk is read-only; then all is as before.
    pub fn freeze(
        &self,
        next: WritableLayer,
        commit: impl FnOnce() -> Result<(), Error>,
        settle: impl FnOnce() -> Result<(), Error>,
    ) -> Result<Result<(), Error>, Error> {
        let above = self.above.as_ref().ok_or(Error::ReadOnly)?;
        let _settling = self.settling();
        let now = above.load_full();
        let active = now.uppers.first().ok_or(Error::ReadOnly)?;
        let next = Arc::new(next);
        active.freeze(|| {
            commit()?;
            above.rcu(|now| {
                let uppers = [&next].into_iter().chain(&now.uppers);
                Above {
                    uppers: uppers.cloned().collect(),
                    sealed: now.sealed.clone(),
                }
            });
            Ok(())
        })?;
        Ok(settle().inspect_err(|_| next.give_up()))
    }

    fn settling(&self) -> Guard<MutexGuard<'_, ()>> {
        self.settling.lock()
    }

    /// Lets the lowest uppers, `sealed`, the oldest first, be looked up as one with all below, and
    /// lets go of what they took in memory. One at a time may do this.
    ///
    /// # Errors
    /// They cannot be told apart, or have data too far away; all stays as it is.
    pub(super) fn fold(&self, sealed: &[Arc<WritableLayer>]) -> Result<(), Error> {
        let above = self.above.as_ref().ok_or(Error::ReadOnly)?;
        if sealed.is_empty() {
            return Ok(());
        }
        let below = above.load_full();
        let one = SealedLayers::above(below.sealed.as_deref(), sealed, self.sectors().0)?;
        let one = Arc::new(one);
        drop(below);
        let old = above.rcu(|now| {
            let left = now.uppers.len().saturating_sub(sealed.len());
            Above {
                uppers: now.uppers[..left].to_vec(),
                sealed: Some(one.clone()),
            }
        });
        // Else the last reader has to free it all, which takes long.
        for _ in 0..MAX_WAIT {
            if Arc::strong_count(&old) == 1 {
                break;
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// The uppers of this moment, topmost first, but for those that were sealed.
    pub fn uppers(&self) -> Vec<Arc<WritableLayer>> {
        let above = self.above.as_ref().map(ArcSwap::load);
        above.map_or_else(Vec::new, |above| above.uppers.clone())
    }

    /// How many uppers were frozen since the disk was opened, or were not sealed then.
    pub fn frozen(&self) -> usize {
        let above = self.above.as_ref().map(ArcSwap::load);
        above.map_or(0, |above| {
            let sealed = above.sealed.as_ref().map_or(0, |sealed| sealed.len());
            sealed + above.uppers.len().saturating_sub(1)
        })
    }

    /// Mappings of everything above the image.
    pub(super) fn mappings(&self) -> u64 {
        let above = self.above.as_ref().map(ArcSwap::load_full);
        above.map_or(0, |above| {
            let uppers: u64 = above.uppers.iter().map(|upper| upper.mappings()).sum();
            uppers + above.sealed.as_ref().map_or(0, |sealed| sealed.mappings())
        })
    }
}

/// Puts what `spans` finds of a range under what is in `into` already, as far as there is room.
fn lay(start: u64, sectors: u64, into: &mut Lookup, mut spans: impl FnMut(u64, u64, &mut Lookup)) {
    if into.spans.is_empty() {
        return spans(start, sectors, into);
    }
    let mut at = start;
    for span in std::mem::take(&mut into.spans) {
        let before = into.spans.len();
        match span.content {
            _ if before >= MAX_SPANS => return,
            SpanContent::Lower => spans(at, span.sectors, into),
            _ => into.spans.push(span),
        }
        let covered: u64 = into.spans[before..].iter().map(|span| span.sectors).sum();
        if covered < span.sectors {
            return;
        }
        at += span.sectors;
    }
}
