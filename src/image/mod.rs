//! Images: layers merged into one disk.
//!
//! An image is opened in two steps. [`Stack::open_files`](config::Stack::open_files) opens the files of
//! all layers and reads no byte of them. [`Image::load`] reads the layers on several threads and merges
//! their indexes. It opens no file, so that a process can enter its sandbox between the two steps.
//!
//! A loaded image is immutable and has no size; [`Image::sized`] gives it one. Any number of threads look up
//! where bytes are ([`SizedImage::pieces`]), read them, and decode them with their own
//! [`Unpacker`](unpack::Unpacker).

pub mod block_cache;
pub mod config;
mod container;
mod error;
pub mod identity;
pub mod index;
pub mod layer;
pub mod lineage;
pub mod made_upon;
mod open_layers;
mod padding;
mod parallel;
pub mod paths;
pub mod pieces;
pub mod probe;
pub mod reader;
mod sampling;
mod search;
pub mod segment;
mod stack;
pub mod tables;
mod trace_units;
pub mod unpack;
mod wait_for_seal;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

pub use container::{Container, MAX_STORED, ZFileMap};
pub use error::{BlockError, Error};
pub use lineage::Lineage;
pub use pieces::SizedImage;
pub use segment::MAX_LAYERS;
pub use stack::OpenStack;
pub use trace_units::TracedRun;

use uuid::Uuid;

use config::Stack;
use identity::{Hash, LayerId, StackId};
use index::Index;
use layer::Layer;
use lineage::{Placed, needs_identities};
use made_upon::MadeUpon;
use parallel::Workers;
use segment::{MAX_MAPPINGS, Segment};
use tables::{MappedTables, Stored};

use crate::format::lsmt::{self, Header};
use crate::source::Blob;

/// Offset beyond the end of every blob.
const BEYOND: u64 = 1 << 62;

/// Least number of segments that are merged on several threads: starting threads takes longer for fewer.
const PARALLEL_FROM: usize = 1 << 16;

/// The merged layers of a stack. Shared by all readers.
#[derive(Debug)]
pub struct Image {
    layers: Vec<Layer>,
    index: Index,
    lineage: Lineage,
    workers: Workers,
    /// Identities of the layers, read when the lineage check needs them.
    ids: OnceLock<Vec<LayerId>>,
    /// Mapped file of the index and the block tables, if they are in one.
    tables: Option<MappedTables>,
}

impl Image {
    /// Opens the files of a stack and loads it.
    ///
    /// # Errors
    /// Those of [`Stack::open_files`] and [`Image::load`].
    pub fn open(stack: &Stack) -> Result<Self, Error> {
        Self::load(stack.open_files()?)
    }

    /// Loads all layers of a stack and merges their indexes. Opens no file.
    ///
    /// # Errors
    /// Those of [`Layer::load`] for any layer; [`Error::TooManyMappings`], [`Error::NoSize`], and those
    /// of [`Lineage::check`].
    pub fn load(stack: OpenStack) -> Result<Self, Error> {
        let image = Self::load_in_any_order(stack)?;
        image.lineage.check(0, &image.placed(&[])?)?;
        Ok(image)
    }

    /// Loads a stack as [`Image::load`] does, without checking its lineage.
    ///
    /// # Errors
    /// Those of [`Layer::load`] for any layer; [`Error::TooManyMappings`], [`Error::NoSize`].
    pub fn load_in_any_order(stack: OpenStack) -> Result<Self, Error> {
        let stored = stack.tables.as_ref().and_then(|tables| {
            let stored = tables.load(&stack.blobs);
            stored.inspect_err(tables::refused).ok()
        });
        let image = match stored {
            Some(stored) if stored.layers.len() == stack.blobs.len() => Self {
                layers: stored.layers,
                index: stored.index,
                lineage: stack.lineage,
                workers: stack.workers,
                ids: stored.ids.map(OnceLock::from).unwrap_or_default(),
                tables: Some(stored.tables),
            },
            stored => Self::merged(stack, stored)?,
        };
        if image.size() == 0 {
            return Err(Error::NoSize);
        }
        Ok(image)
    }

    /// Loads the layers above those in `stored`, and merges all.
    fn merged(mut stack: OpenStack, stored: Option<Stored>) -> Result<Self, Error> {
        let (workers, lineage) = (stack.workers, stack.lineage);
        let (mut layers, mut lists, mut tables) = (Vec::new(), Vec::new(), None);
        if let Some(stored) = stored {
            layers = stored.layers;
            lists.push(stored.index.iter().collect());
            tables = Some(stored.tables);
        }
        let above = stack.blobs.split_off(layers.len());
        let mappings = lists.iter().map(Vec::len).sum::<usize>() as u64;
        for (layer, segments) in load(workers, above, layers.len(), mappings)? {
            layers.push(layer);
            lists.push(segments);
        }
        Ok(Self {
            layers,
            index: Index::new(&merge_all(workers, lists)),
            lineage,
            workers,
            ids: OnceLock::new(),
            tables,
        })
    }

    /// Creates an image without layers and without a size, for a writable layer that is the first of its
    /// image.
    pub fn empty(lineage: Lineage) -> Self {
        Self {
            layers: Vec::new(),
            index: Index::new(&[]),
            lineage,
            workers: Workers::ONE,
            ids: OnceLock::new(),
            tables: None,
        }
    }

    /// The image as a disk of `size` bytes, as if an empty layer of that size were above its layers.
    #[inline]
    pub fn sized(&self, size: u64) -> SizedImage<'_> {
        SizedImage::new(self, size)
    }

    /// The image as a disk of the size that its layers declare.
    pub fn at_own_size(&self) -> SizedImage<'_> {
        self.sized(self.size())
    }

    /// Size in bytes that the topmost layer with a size declares; 0 if none does.
    pub fn size(&self) -> u64 {
        let sizes = self.layers.iter().rev();
        let mut sizes = sizes.map(|layer| layer.trailer().virtual_size);
        sizes.find(|size| *size > 0).unwrap_or(0)
    }

    /// Unit of reads in bytes: the largest block size of the compressed layers, at least 4096. Reading less
    /// decodes as much.
    pub fn block_size(&self) -> u32 {
        let zfile_maps = self
            .layers
            .iter()
            .filter_map(|layer| layer.container().zfile_map());
        let sizes = zfile_maps.map(|zfile_map| zfile_map.header().format.block_size);
        sizes.max().unwrap_or(0).max(4096)
    }

    /// Clears the records of which pages of the layers are in memory, because some were evicted.
    pub fn forget_resident(&self) {
        for layer in &self.layers {
            layer.container().blob().forget_resident();
        }
    }

    /// The layers, bottom first.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Checks the lineage of `above`, layers above this image, bottom first.
    ///
    /// # Errors
    /// Those of [`Image::placed`] and [`Lineage::check`].
    pub fn check_above(&self, above: &[Placed]) -> Result<(), Error> {
        self.lineage.check(self.layers.len(), &self.placed(above)?)
    }

    /// Returns the layers of the image and those above it, bottom first, for the lineage check.
    ///
    /// # Errors
    /// [`Error::Source`] if the identity of a layer is needed and cannot be read.
    pub fn placed(&self, above: &[Placed]) -> Result<Vec<Placed>, Error> {
        let layers = self.layers.iter();
        let layers = layers.map(|layer| Placed::new(layer.layer_ref().clone(), layer.trailer()));
        let mut placed: Vec<_> = layers.chain(above.iter().cloned()).collect();
        if needs_identities(&placed) {
            for (placed, id) in placed.iter_mut().zip(self.ids()?) {
                placed.id = Some(*id);
            }
        }
        Ok(placed)
    }

    /// Identity of the stack. Reads a few pages of each layer without a uuid, once.
    ///
    /// # Errors
    /// [`Error::Source`] if they cannot be read.
    pub fn stack_id(&self) -> Result<StackId, Error> {
        let ids = self.ids()?.iter();
        Ok(ids.fold(StackId::EMPTY, |stack, layer| stack.below(*layer)))
    }

    fn ids(&self) -> Result<&[LayerId], Error> {
        if let Some(ids) = self.ids.get() {
            return Ok(ids);
        }
        let ids = parallel::each(
            self.workers,
            self.layers.iter().collect(),
            sampling::identity_of,
        );
        let ids = ids.into_iter().collect::<Result<_, _>>()?;
        Ok(self.ids.get_or_init(|| ids))
    }

    /// Record for a layer that is made upon this image; `None` for an image without layers.
    ///
    /// # Errors
    /// Those of [`Image::stack_id`].
    pub fn made_upon(&self) -> Result<Option<MadeUpon>, Error> {
        if self.layers.is_empty() {
            return Ok(None);
        }
        Ok(Some(MadeUpon {
            stack: self.stack_id()?,
            size: self.size(),
        }))
    }

    /// Creates the header of an empty layer above this image, for a disk of `size` bytes. Above an image
    /// without layers, it has no parent and no record.
    ///
    /// # Errors
    /// Those of [`Image::made_upon`].
    pub fn header_above(&self, size: u64, uuid: Uuid) -> Result<Header, Error> {
        let top = self.layers.last().map_or(Uuid::nil(), Layer::uuid);
        let record = self.made_upon()?;
        Ok(Header {
            message: record
                .and_then(|record| record.message(b""))
                .unwrap_or_default(),
            ..Header::empty(size, uuid, top)
        })
    }

    /// The merged index.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// Bytes of the merged index and of the block tables.
    pub fn table_bytes(&self) -> u64 {
        let (nodes, values) = self.index.sections();
        let tables = self.layers.iter().filter_map(|layer| {
            let (bases, starts) = layer.container().zfile_map()?.table().sections();
            Some(size_of_val(bases) + size_of_val(starts))
        });
        (size_of_val(nodes) + size_of_val(values) + tables.sum::<usize>()) as u64
    }

    /// Checks that index and block tables were not truncated while they were mapped. Look-ups before a call
    /// without an error are valid.
    ///
    /// # Errors
    /// [`Error::TablesLost`] if their file was truncated, or its storage failed.
    #[inline]
    pub fn check_tables(&self) -> Result<(), Error> {
        match &self.tables {
            Some(tables) if tables.is_lost() => Err(Error::TablesLost),
            _ => Ok(()),
        }
    }

    /// Calls [`Container::piece`] of the layer with number `layer`. For a number without a layer, which
    /// damaged tables may have, returns a piece past the end of every blob.
    #[inline]
    fn piece(&self, layer: u16, offset: u64, len: u64) -> pieces::Piece {
        match self.layers.get(usize::from(layer)) {
            Some(found) => found.container().piece(layer, offset, len),
            None => pieces::Piece::Plain {
                layer: 0,
                offset: BEYOND,
                len,
            },
        }
    }

    /// Prefetches the table entry that [`Image::piece`] needs.
    #[inline]
    fn prefetch_table(&self, layer: u16, offset: u64) {
        if let Some(layer) = self.layers.get(usize::from(layer)) {
            layer.container().prefetch_table(offset);
        }
    }

    /// Container of the layer with this number, which is from a [`pieces::Piece`].
    #[inline]
    pub fn container(&self, layer: u16) -> &Container {
        self.layers[usize::from(layer)].container()
    }

    /// Serial number of 20 characters, the same for the same lowest `count` layers: a hash of their uuids,
    /// sizes, and checksums of index and block table. It does not depend on paths.
    pub fn serial(&self, count: usize) -> String {
        let mut hash = Hash::EMPTY;
        for layer in self.layers.iter().take(count) {
            sampling::add_structures(&mut hash, layer);
        }
        format!("ovbd{:016x}", hash.value())
    }
}

/// Loads layers on several threads. Returns the layers and the segments of each. Below them are `below`
/// layers with `mappings` mappings in total.
fn load(
    workers: Workers,
    blobs: Vec<Arc<Blob>>,
    below: usize,
    mappings: u64,
) -> Result<Vec<(Layer, Vec<Segment>)>, Error> {
    let total = AtomicU64::new(mappings);
    // A stack has at most `MAX_LAYERS` layers.
    let jobs = blobs.into_iter().zip(below as u16..).collect();
    let loaded = parallel::each(workers, jobs, |(blob, number): (Arc<Blob>, u16)| {
        if total.load(Ordering::Relaxed) > MAX_MAPPINGS {
            return Err(Error::TooManyMappings);
        }
        let (layer, mappings) = Layer::load(blob)?;
        let before = total.fetch_add(mappings.len() as u64, Ordering::Relaxed);
        if before + mappings.len() as u64 > MAX_MAPPINGS {
            return Err(Error::TooManyMappings);
        }
        let segment = |mapping: lsmt::Mapping| {
            Segment::new(mapping, number).ok_or_else(|| Error::Position {
                layer: layer.layer_ref().clone(),
                offset: mapping.offset(),
                moffset: mapping.moffset(),
            })
        };
        let segments = mappings.into_iter().map(segment);
        let segments = segments.collect::<Result<Vec<_>, _>>()?;
        Ok((layer, segments))
    });
    loaded.into_iter().collect()
}

/// Merges pairs of neighbours, then pairs of the results, and so on: each segment is merged as often as the
/// number of layers has binary digits.
fn merge_all(workers: Workers, mut lists: Vec<Vec<Segment>>) -> Vec<Segment> {
    let total: usize = lists.iter().map(Vec::len).sum();
    while lists.len() > 1 {
        let mut rest = lists.into_iter();
        let mut pairs = Vec::new();
        while let Some(lower) = rest.next() {
            pairs.push((lower, rest.next()));
        }
        let one = |(lower, upper): (Vec<Segment>, Option<Vec<Segment>>)| match upper {
            Some(upper) => segment::merge(lower, &upper),
            None => lower,
        };
        lists = if total < PARALLEL_FROM {
            pairs.into_iter().map(one).collect()
        } else {
            parallel::each(workers, pairs, one)
        };
    }
    lists.pop().unwrap_or_default()
}
