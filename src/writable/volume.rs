//! A disk: an image under its writable layers.
//!
//! Writes go to one layer, the *active* one. The layers below it are *frozen*: each was active until a snapshot put
//! a new one above it. Sealed ones are *folded*: looked up together. The image itself never changes.
//!
//! ```text
//! active layer -- frozen layers, until they are sealed -- layers sealed since the start -- image
//! ```
//!
//! A read uses the layers of one moment, without a lock.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use arc_swap::ArcSwap;

use super::above::{Above, ActiveLayer};
use super::create::check_size;
use super::frozen::{FrozenLayer, SealedLayer};
use super::locks::{Rank, RankedMutex, Sealing};
use super::lookup::Lookup;
use super::manifest::{FrozenPair, ManifestFile, NewManifest};
use super::retry::FlushRetries;
use super::{Error, WritableLayer};
use crate::image::{Image, SizedImage};
use crate::io::scatter::Cursor;
use crate::units::{Sector, SectorRange};

/// How long to wait for readers of replaced layers, in milliseconds.
const MAX_WAIT: u32 = 1000;

/// A disk. All its queue workers share it.
#[derive(Debug)]
pub struct Volume {
    image: Image,
    /// `None`: the disk is read-only.
    above: Option<ArcSwap<Above>>,
    /// Locked until the manifest that names the active layer is durable.
    manifest_sync: RankedMutex<()>,
    /// In bytes. It only grows, after everything that the new sectors need is in place.
    size: AtomicU64,
}

impl Volume {
    /// Makes a read-only disk.
    pub fn read_only(image: Image) -> Self {
        Self {
            size: image.size().into(),
            image,
            above: None,
            manifest_sync: RankedMutex::new(Rank::ManifestSync, ()),
        }
    }

    /// Makes a disk without snapshots: a writable layer above an image. The disk has the size of that layer.
    pub fn writable(image: Image, layer: WritableLayer) -> Self {
        let active = ActiveLayer {
            number: 0,
            layer: layer.into(),
        };
        Self::with_layers(image, Above::new(Vec::new(), Vec::new(), active))
    }

    /// Puts the layers `above` on an image. The disk has the size of the active one.
    pub(super) fn with_layers(image: Image, above: Above) -> Self {
        Self {
            size: above.active().header().virtual_size.into(),
            image,
            above: Some(ArcSwap::from_pointee(above)),
            manifest_sync: RankedMutex::new(Rank::ManifestSync, ()),
        }
    }

    /// Returns the image below the writable layers.
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// Returns the image with the size of the volume, as it reads below the writable layers.
    #[inline]
    pub fn lower(&self) -> SizedImage<'_> {
        self.image.sized(self.size())
    }

    /// Returns whether the disk is writable.
    pub fn is_writable(&self) -> bool {
        self.above.is_some()
    }

    /// Returns the size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Returns the end of the disk; the last sector may be partial.
    pub fn sectors(&self) -> Sector {
        Sector::at_or_after(self.size())
    }

    /// Fills `into` with the spans that make up `range`, which lies on the disk: only with the first ones if there
    /// are many, and with none if all of the range lies in the image. Takes no lock in the last case. Sectors of earlier
    /// look-ups are still not reused.
    #[inline]
    pub fn lookup(&self, range: SectorRange, into: &mut Lookup) {
        into.begin();
        let Some(above) = &self.above else { return };
        if range.is_empty() {
            return;
        }
        let above = above.load();
        for layer in above.layers() {
            if layer.may_hold(range) {
                into.fill(range, |part, into| layer.spans(part, into));
            }
        }
        if let Some(sealed) = above.sealed()
            && sealed.may_hold(range)
        {
            into.fill(range, |part, into| sealed.spans(part, into));
        }
        into.end();
    }

    /// Writes the next bytes of `data` to the sectors of `range`. Never waits for storage.
    ///
    /// # Errors
    /// As [`WritableLayer::write`]: [`FlushRetries`] decides whether to repeat it after a flush;
    /// [`Error::ReadOnly`].
    pub fn write_now(&self, range: SectorRange, data: Cursor<'_, '_>) -> Result<(), Error> {
        self.change(|layer| layer.write(range, data))
    }

    /// Makes the sectors of `range`, at most [`MAX_STEP`](super::MAX_STEP), read as zeros, and frees their space.
    ///
    /// # Errors
    /// As [`Volume::write_now`] and [`Volume::flush`].
    pub fn discard(&self, range: SectorRange) -> Result<(), Error> {
        self.change_and_wait(|layer| layer.discard(range))
    }

    /// Makes the sectors of `range`, at most [`MAX_STEP`](super::MAX_STEP), read as zeros; with `unmap`, frees
    /// their space.
    ///
    /// # Errors
    /// As [`Volume::write_now`] and [`Volume::flush`].
    pub fn write_zeroes(&self, range: SectorRange, unmap: bool) -> Result<(), Error> {
        self.change_and_wait(|layer| match unmap {
            true => layer.discard(range),
            false => layer.write_zeroes(range),
        })
    }

    /// Makes all answered writes durable. Waits for storage.
    ///
    /// # Errors
    /// As [`WritableLayer::flush`].
    pub fn flush(&self) -> Result<(), Error> {
        let Some(above) = &self.above else {
            return Ok(());
        };
        let now = above.load_full();
        // Until the manifest is durable, the next start may not find the active layer.
        drop(self.manifest_sync.lock());
        // Frozen layers first: they may hold writes answered before this flush.
        let frozen = now.frozen().iter().map(FrozenLayer::layer);
        let unsealed = frozen.filter(|layer| !layer.is_sealed());
        unsealed.chain([now.active()]).try_for_each(|layer| {
            layer.flush()?;
            layer.check_not_broken()
        })
    }

    /// Returns whether a flush may free storage: that of data which was discarded or replaced since the last one.
    pub fn frees_by_flush(&self) -> bool {
        let above = self.above.as_ref().map(ArcSwap::load);
        above.is_some_and(|above| above.active().frees_by_flush())
    }

    /// Applies `change` to the active layer; repeats it if a snapshot froze the layer meanwhile.
    fn change(&self, change: impl Fn(&WritableLayer) -> Result<(), Error>) -> Result<(), Error> {
        let above = self.above.as_ref().ok_or(Error::ReadOnly)?;
        loop {
            match change(above.load_full().active()) {
                // Another layer is active now.
                Err(Error::Frozen) => {}
                done => return done,
            }
        }
    }

    /// Applies `change` to the active layer; repeats it after each flush that may help.
    fn change_and_wait(
        &self,
        change: impl Fn(&WritableLayer) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut retries = FlushRetries::default();
        loop {
            match self.change(&change) {
                Err(error) if retries.allow(&error) => self.flush()?,
                done => return done,
            }
        }
    }

    /// Returns the layers above the image.
    ///
    /// # Errors
    /// [`Error::ReadOnly`].
    pub(super) fn above(&self) -> Result<Arc<Above>, Error> {
        Ok(self.swap()?.load_full())
    }

    fn swap(&self) -> Result<&ArcSwap<Above>, Error> {
        self.above.as_ref().ok_or(Error::ReadOnly)
    }

    /// Takes the snapshot that freezes the active layer as `pair`: puts `next`, an empty layer, above it. Writes wait
    /// while `new`, which makes the next start find `next`, replaces the manifest. Then that is made durable, and flushes
    /// wait for it. If it fails, `next` takes no more writes: they might be lost. The inner result is that.
    ///
    /// # Errors
    /// Those of the replacement, or [`Error::ReadOnly`]; then the disk is as before.
    pub(super) fn freeze(
        &self,
        file: &mut ManifestFile,
        pair: FrozenPair,
        next: &ActiveLayer,
        new: &NewManifest,
    ) -> Result<Result<(), Error>, Error> {
        let above = self.swap()?;
        let _manifest_sync = self.manifest_sync.lock();
        FrozenLayer::freeze(pair, above.load_full().active(), |frozen| {
            file.put_in_place(new)?;
            above.rcu(|now| now.with_snapshot(frozen, next));
            Ok(())
        })?;
        Ok(file.sync(new).inspect_err(|_| next.layer.mark_broken()))
    }

    /// Makes the disk `size` bytes large. The manifest is the proof that no snapshot puts a layer of the old size
    /// above meanwhile.
    ///
    /// # Errors
    /// As [`Snapshots::grow_disk`](super::Snapshots::grow_disk).
    pub(super) fn grow(&self, _: &mut ManifestFile, size: u64) -> Result<(), Error> {
        let above = self.above()?;
        let current = self.size();
        if size < current {
            return Err(Error::Shrinks { size, current });
        }
        if size > current {
            check_size(size)?;
        }
        above.active().grow(size)?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    /// Seals the frozen layers of `now`, oldest first, until one fails. Then replaces those that are sealed, and all
    /// below them, by one index, and frees the memory of their maps. Only a seal removes layers from the frozen ones,
    /// and [`Sealing`] is the proof that there is no other one: they begin with those of `now`.
    ///
    /// # Errors
    /// Those of [`WritableLayer::seal`] for the first layer that fails; those of [`Above::fold`].
    pub(super) fn seal(&self, _: &mut Sealing, now: Arc<Above>) -> Result<(), Error> {
        let mut layers = Vec::new();
        let mut sealed = Ok(());
        for layer in now.frozen() {
            match layer.seal() {
                Ok(layer) => layers.push(layer),
                Err(error) => {
                    sealed = Err(error);
                    break;
                }
            }
        }
        sealed.and(self.fold(now, &layers))
    }

    /// Folds `layers`, the oldest frozen ones of `now`.
    fn fold(&self, now: Arc<Above>, layers: &[SealedLayer]) -> Result<(), Error> {
        if layers.is_empty() {
            return Ok(());
        }
        let folded = Arc::new(now.fold(layers, self.sectors())?);
        drop(now);
        let old = self
            .swap()?
            .rcu(|now| now.with_folded(&folded, layers.len()));
        // Otherwise the last reader would free the old layers, which takes long.
        for _ in 0..MAX_WAIT {
            if Arc::strong_count(&old) == 1 {
                break;
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Returns the writable layers that are not folded, topmost first.
    pub fn layers(&self) -> Vec<Arc<WritableLayer>> {
        let above = self.above.as_ref().map(ArcSwap::load);
        above.map_or_else(Vec::new, |above| above.layers().cloned().collect())
    }

    /// Returns the number of layers between the image and the active one.
    pub fn layers_below_active(&self) -> usize {
        let above = self.above.as_ref().map(ArcSwap::load);
        above.map_or(0, |above| above.layers_below_active())
    }
}
