//! Delivers the stored bytes of subreads to guest memory: copies plain bytes, decodes compressed ones.
//!
//! Bytes known to be in memory are copied once from the mapping of their blob. Plain bytes are copied into
//! guest memory. Compressed bytes are copied into a buffer of the worker, so that the bytes that are verified
//! are those that are decoded, and decoded from there into guest memory. Other bytes are read first.

use std::sync::Arc;

use super::BlockBackend;
use super::drop_behind::DropBehind;
use super::read_plan::Subread;
use super::stats::queue::{LayerReads, QueueStats, ReadSource, cell};
use super::stats::{DiskCell, StatsPage};
use crate::image::block_cache::BlockCache;
use crate::image::pieces::{CompressedRun, Piece};
use crate::image::unpack::Unpacker;
use crate::image::{Error, Image, MAX_STORED};
use crate::io::scatter::Cursor;
use crate::source::{Located, PresentRange};
use crate::writable::Lookup;

/// Decoders and buffers of one worker.
pub struct Delivery<'a> {
    image: &'a Image,
    unpacker: Unpacker,
    /// Stored bytes of the current subread, private while they are verified and decoded.
    buffer: Vec<u8>,
    /// Drops bytes from the page cache once they are served, if enabled.
    drop_behind: Option<DropBehind<'a>>,
    stats: QueueStats<'a>,
    layer_reads: LayerReads,
    cached: Option<CacheUse<'a>>,
}

/// Misses of the cache between two looks at its size, which take its locks.
const LOOK_AT_CACHE: u32 = 32;

/// The cache of decoded blocks, if it is enabled, as this worker uses it.
struct CacheUse<'a> {
    cache: &'a Arc<BlockCache>,
    page: &'a StatsPage,
    misses: u32,
}

impl CacheUse<'_> {
    fn count(&mut self, stats: &QueueStats<'_>, hit: bool) {
        if hit {
            return stats.add(cell::CACHE_HITS, 1);
        }
        stats.add(cell::CACHE_MISSES, 1);
        self.misses += 1;
        if self.misses >= LOOK_AT_CACHE {
            self.misses = 0;
            self.page.set(DiskCell::BlockCacheBytes, self.cache.bytes());
            let evictions = self.cache.take_evictions();
            self.page.add(DiskCell::BlockCacheEvictions, evictions);
        }
    }
}

impl<'a> Delivery<'a> {
    /// Decoders and buffers for `backend`. Counts reads in `stats`.
    pub fn new(backend: &'a BlockBackend, stats: QueueStats<'a>) -> Self {
        Self {
            image: backend.volume().image(),
            unpacker: Unpacker::with_cache(backend.cache().cloned()),
            buffer: vec![0; MAX_STORED],
            drop_behind: backend.tuning().drop_cache.then(DropBehind::default),
            stats,
            layer_reads: LayerReads::default(),
            cached: backend.cache().map(|cache| CacheUse {
                cache,
                page: backend.stats(),
                // The first block is seen at once.
                misses: LOOK_AT_CACHE,
            }),
        }
    }

    /// Moves the counts of reads to the statistics page.
    pub fn publish_counts(&mut self) {
        self.layer_reads.publish(&self.stats);
    }

    /// The image.
    #[inline]
    pub fn image(&self) -> &'a Image {
        self.image
    }

    /// Locates the stored bytes of `subread`, whose data files `lookup` names. `None` for zeros, which are
    /// not stored.
    #[inline]
    pub fn locate<'t>(&self, subread: &Subread, lookup: &'t Lookup) -> Option<Located<'t>>
    where
        'a: 't,
    {
        let image: &'t Image = self.image;
        let (blob, offset, len) = match subread {
            Subread::Image(piece) => {
                let (layer, offset, len) = match piece {
                    Piece::Zero { .. } => return None,
                    Piece::Plain { layer, offset, len } => (*layer, *offset, *len as usize),
                    Piece::Compressed(run) => (run.layer, run.offset, run.stored as usize),
                };
                (image.container(layer).blob(), offset, len)
            }
            Subread::Writable { file, offset, len } => {
                (&**lookup.file(*file), *offset, *len as usize)
            }
        };
        Some(blob.locate(offset, len))
    }

    /// Serves a subread from the mapping of its blob, if all its bytes are known to be in memory; returns
    /// whether it did.
    ///
    /// # Errors
    ///
    /// [`Error::Block`] if a block is damaged.
    #[inline]
    pub fn from_memory(
        &mut self,
        subread: &Subread,
        range: PresentRange<'_>,
        mut cursor: Cursor<'_, '_>,
    ) -> Result<bool, Error> {
        let (blob, len) = (range.blob(), range.len());
        let run = match subread {
            Subread::Image(Piece::Compressed(run)) => Some(run),
            _ => None,
        };
        if let Some(run) = run {
            let container = self.image.container(run.layer);
            let held = self.unpacker.unpack_held(container, run, &mut cursor);
            if let Some(cached) = &mut self.cached
                && run.count == 1
            {
                cached.count(&self.stats, held);
            }
            if held {
                return Ok(true);
            }
        }
        let Some(mapped) = range.resident() else {
            return Ok(false);
        };
        let Some(run) = run else {
            let mut at = 0;
            cursor.take(len, |target| {
                if let Ok(source) = mapped.offset(at) {
                    source.copy_to_volatile_slice(target);
                }
                at += target.len();
            });
            let intact = !blob.is_lost();
            if intact {
                self.layer_reads.count(ReadSource::Map, len);
            }
            return Ok(intact);
        };
        let bytes = &mut self.buffer[..len];
        mapped.copy_to(bytes);
        // The file was truncated under its mapping: the bytes must be read instead.
        if blob.is_lost() {
            return Ok(false);
        }
        self.layer_reads.count(ReadSource::Map, len);
        let container = self.image.container(run.layer);
        let unpacked = self.unpacker.unpack(container, run, bytes, &mut cursor);
        self.count_decoded(subread, unpacked)?;
        Ok(true)
    }

    /// Serves a subread from the page cache, if all its bytes are there; returns whether it did. Does not
    /// wait for storage.
    ///
    /// # Errors
    ///
    /// [`Error::Source`] if the file ends first, [`Error::Block`] if a block is damaged.
    pub fn from_page_cache(
        &mut self,
        subread: &Subread,
        range: PresentRange<'_>,
        cursor: Cursor<'_, '_>,
    ) -> Result<bool, Error> {
        let bytes = &mut self.buffer[..range.len()];
        if !range.read_cached(bytes)? {
            return Ok(false);
        }
        self.layer_reads.count(ReadSource::Pread, bytes.len());
        note_or_drop(&mut self.drop_behind, self.image, subread, range);
        let delivered = deliver(&mut self.unpacker, self.image, subread, bytes, cursor);
        self.count_decoded(subread, delivered)?;
        Ok(true)
    }

    /// Serves a subread by `pread`, which waits for storage.
    ///
    /// # Errors
    ///
    /// [`Error::Source`] if the read fails or the file ends first, [`Error::Block`] if a block is damaged.
    pub fn from_storage(
        &mut self,
        subread: &Subread,
        range: PresentRange<'_>,
        cursor: Cursor<'_, '_>,
    ) -> Result<(), Error> {
        let bytes = &mut self.buffer[..range.len()];
        range.read_exact(bytes)?;
        self.layer_reads.count(ReadSource::Pread, bytes.len());
        note_or_drop(&mut self.drop_behind, self.image, subread, range);
        let delivered = deliver(&mut self.unpacker, self.image, subread, bytes, cursor);
        self.count_decoded(subread, delivered)
    }

    /// Serves a subread from its stored bytes `bytes`, which the ring has read.
    ///
    /// # Errors
    ///
    /// [`Error::Block`] if a block is damaged.
    pub fn from_bytes(
        &mut self,
        subread: &Subread,
        range: PresentRange<'_>,
        bytes: &[u8],
        cursor: Cursor<'_, '_>,
    ) -> Result<(), Error> {
        self.layer_reads.count(ReadSource::Uring, bytes.len());
        note_or_drop(&mut self.drop_behind, self.image, subread, range);
        let delivered = deliver(&mut self.unpacker, self.image, subread, bytes, cursor);
        self.count_decoded(subread, delivered)
    }

    /// Counts a subread that waited for a registry.
    pub fn count_fetched(&self, bytes: usize) {
        self.stats.add(cell::FETCHED_READS, 1);
        self.stats.add(cell::FETCHED_READ_BYTES, bytes as u64);
    }

    /// Counts the decoded blocks of a subread, or a damaged one.
    #[inline]
    fn count_decoded(&mut self, subread: &Subread, result: Result<(), Error>) -> Result<(), Error> {
        match result {
            Ok(()) => {
                if let Subread::Image(Piece::Compressed(run)) = subread
                    && let Some(map) = self.image.container(run.layer).zfile_map()
                {
                    let codec = map.header().format.algorithm as usize;
                    self.layer_reads.count_decoded(codec, run.count);
                }
            }
            Err(Error::Block { .. }) => self.stats.add(cell::DAMAGED_BLOCKS, 1),
            Err(_) => {}
        }
        result
    }
}

/// Marks the bytes of a subread, which were read, as in memory, or drops them from there. Data files of
/// writable layers are left to the kernel, because they change.
fn note_or_drop<'a>(
    drop: &mut Option<DropBehind<'a>>,
    image: &'a Image,
    subread: &Subread,
    range: PresentRange<'_>,
) {
    let (Subread::Image(Piece::Plain { layer, .. })
    | Subread::Image(Piece::Compressed(CompressedRun { layer, .. }))) = subread
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

/// Copies or decodes the stored bytes of a subread into guest memory.
fn deliver(
    unpacker: &mut Unpacker,
    image: &Image,
    subread: &Subread,
    bytes: &[u8],
    mut cursor: Cursor<'_, '_>,
) -> Result<(), Error> {
    match subread {
        Subread::Image(Piece::Compressed(run)) => {
            unpacker.unpack(image.container(run.layer), run, bytes, &mut cursor)
        }
        _ => {
            cursor.write(bytes);
            Ok(())
        }
    }
}
