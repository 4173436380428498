//! Images whose tables are in a mapped file, so that opening them reads nothing of their layers.
//!
//! [`TablesWriter`] writes the file after the first open of a stack; [`TablesFile`] is what later opens
//! use. `format/tables.rs` describes the file. All processes that open the same stack map the same
//! file, so that its pages are in memory once.
//!
//! The caller has verified the checksums when it opened the file. Here, the key is compared with the
//! identities of the layers, and each record is held to the rules of its format. Index and block
//! tables are used as they are, without a pass over them: each entry is checked where it is used, and
//! a wrong one gives an I/O error or other bytes of the image's layers.
//!
//! A file that is truncated while it is mapped reads as zeros from then on. [`Image::check_tables`]
//! reports it, and the reads of the disk fail.
//!
//! [`Image::check_tables`]: super::Image::check_tables
#![cfg_attr(
    not(test),
    warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)
)]

mod write;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use thiserror::Error;

use super::identity::LayerId;
use super::index::Index;
use super::layer::Layer;
use crate::format::digest::Digest;
use crate::format::tables::{
    self, Header, LayerIdentity, LayerRecord, Layout, RECORD_LEN, TablesError,
};
use crate::format::zfile::{BlockTable, Totals};
use crate::io::mapped_file::{Access, MapError, MappedFile};
use crate::io::section::Section;
use crate::ratelimited_log;
use crate::reason::reason;
use crate::source::{self, Blob};

pub use write::{TablesWriter, WriteError};

/// Whether the file can be mapped on this processor: its numbers are little-endian.
pub const SUPPORTED: bool = cfg!(target_endian = "little");

/// The tables of a stack cannot be used.
#[derive(Debug, Error)]
pub enum LoadError {
    /// The file is not that of the stack, or holds impossible numbers.
    #[error(transparent)]
    Tables(#[from] TablesError),
    /// The file cannot be read.
    #[error("cannot read the image tables")]
    Read(#[source] io::Error),
    /// The file cannot be mapped.
    #[error("cannot map the image tables")]
    Map(#[from] MapError),
    /// A layer cannot be examined.
    #[error(transparent)]
    Source(#[from] source::Error),
    /// The sections do not fit the records.
    #[error("image tables are damaged: the length of a section differs from its records")]
    Section,
}

/// The identities of layers, bottom first; `None` if one of them has none, as a block device.
///
/// # Errors
/// [`source::Error::Open`] if a file cannot be examined.
pub fn identities<'b>(
    blobs: impl IntoIterator<Item = &'b Blob>,
) -> Result<Option<Vec<LayerIdentity>>, source::Error> {
    let identities = blobs.into_iter().map(|blob| {
        let identity = blob.identity()?;
        Ok(identity.map(|identity| identity.stored()))
    });
    identities.collect()
}

/// The tables file of a stack, open for reading, with its checksums verified.
#[derive(Debug)]
pub struct TablesFile {
    /// Locked against eviction as long as it is open.
    file: File,
}

/// Tables in use.
#[derive(Debug)]
pub(super) struct MappedTables {
    mapping: Arc<MappedFile>,
    _file: Arc<TablesFile>,
}

/// What the tables of a stack hold.
pub(super) struct Stored {
    pub(super) layers: Vec<Layer>,
    pub(super) index: Index,
    /// The layers' identities, if they were needed when the file was written.
    pub(super) ids: Option<Vec<LayerId>>,
    pub(super) tables: MappedTables,
}

impl MappedTables {
    /// Whether the file no longer holds a page that was touched.
    #[inline]
    pub(super) fn is_lost(&self) -> bool {
        self.mapping.is_lost()
    }
}

impl TablesFile {
    /// Takes a file whose checksums were verified, and whose shared lock keeps it from eviction.
    pub fn new(file: File) -> Self {
        Self { file }
    }

    /// Maps the tables of the lowest layers of a stack; the file says how many. Reads nothing of the
    /// layers.
    ///
    /// # Errors
    /// A [`LoadError`]: the tables are of no use, and the layers must be read.
    pub(super) fn load(self: &Arc<Self>, blobs: &[Arc<Blob>]) -> Result<Stored, LoadError> {
        let mut bytes = [0; tables::HEADER_LEN];
        let len = self.file.metadata().map_err(LoadError::Read)?.len();
        let read = self.file.read_exact_at(&mut bytes, 0);
        read.map_err(LoadError::Read)?;
        let (header, layout) = Header::decode(&bytes, len)?;
        let blobs = blobs.get(..header.counts.layers as usize);
        let blobs = blobs.ok_or(LoadError::Section)?;
        header.check_key(&key(blobs)?)?;
        let mapping = Arc::new(MappedFile::new(&self.file, 0, len, Access::Read)?);
        let mut sections = Sections::new(&mapping, &layout);
        let records = sections.records(blobs.len())?;
        let (mut layers, mut ids) = (Vec::with_capacity(blobs.len()), Vec::new());
        for (blob, record) in blobs.iter().zip(records.iter()) {
            let record = LayerRecord::decode(&{ *record })?;
            if record.blob_len != blob.len() {
                return Err(TablesError::Record("length of the blob").into());
            }
            let table = match &record.zfile {
                Some(header) => Some(sections.block_table(&header.totals)?),
                None => None,
            };
            let sampled = record.sampled.map(LayerId::Sampled);
            ids.extend(LayerId::named(record.trailer.uuid).or(sampled));
            layers.push(Layer::known(Arc::clone(blob), record, table));
        }
        let index = sections.index(&header)?;
        let ids = (ids.len() == layers.len()).then_some(ids);
        let tables = MappedTables {
            mapping,
            _file: Arc::clone(self),
        };
        Ok(Stored {
            layers,
            index,
            ids,
            tables,
        })
    }
}

/// The key of a stack, which must be made of files and blobs.
fn key(blobs: &[Arc<Blob>]) -> Result<Digest, LoadError> {
    let identities = identities(blobs.iter().map(|blob| &**blob))?;
    let identities = identities.ok_or(LoadError::Section)?;
    Ok(tables::key(&identities))
}

/// Takes the sections of a mapped file apart.
struct Sections<'m> {
    mapping: &'m Arc<MappedFile>,
    layout: &'m Layout,
    /// Byte at which the bases of the next block table start.
    bases: u64,
    /// Byte at which the starts of the next block table start.
    starts: u64,
}

impl<'m> Sections<'m> {
    fn new(mapping: &'m Arc<MappedFile>, layout: &'m Layout) -> Self {
        Self {
            mapping,
            layout,
            bases: layout.bases,
            starts: layout.starts,
        }
    }

    /// `count` items from byte `at` on.
    fn section<T>(&self, at: u64, count: u64) -> Result<Section<T>, LoadError>
    where
        T: zerocopy::FromBytes + zerocopy::Immutable,
    {
        let at = usize::try_from(at).map_err(|_| LoadError::Section)?;
        let count = usize::try_from(count).map_err(|_| LoadError::Section)?;
        Section::mapped(self.mapping, at, count).ok_or(LoadError::Section)
    }

    /// The records of `count` layers, to be decoded from private copies.
    fn records(&self, count: usize) -> Result<Section<[u8; RECORD_LEN]>, LoadError> {
        self.section(self.layout.layers, count as u64)
    }

    /// The next block table, which is that of a ZFile with these totals.
    fn block_table(&mut self, totals: &Totals) -> Result<BlockTable, LoadError> {
        let starts = totals.blocks.checked_add(1).ok_or(LoadError::Section)?;
        let bases = usize::try_from(starts).map_err(|_| LoadError::Section)?;
        let bases = BlockTable::bases(bases) as u64;
        let after = |at: u64, count: u64, len: usize| {
            let len = count.checked_mul(len as u64);
            len.and_then(|len| at.checked_add(len))
                .ok_or(LoadError::Section)
        };
        let bases_end = after(self.bases, bases, size_of::<u64>())?;
        let starts_end = after(self.starts, starts, size_of::<u32>())?;
        if bases_end > self.layout.starts || starts_end > self.layout.values {
            return Err(LoadError::Section);
        }
        let table = BlockTable::from_sections(
            self.section(self.bases, bases)?,
            self.section(self.starts, starts)?,
            totals.table_offset,
        );
        (self.bases, self.starts) = (bases_end, starts_end);
        table.ok_or(LoadError::Section)
    }

    /// The merged index.
    fn index(&self, header: &Header) -> Result<Index, LoadError> {
        let counts = header.counts;
        let values = counts.segments.saturating_mul(tables::VALUE_LEN);
        let len = usize::try_from(counts.segments).map_err(|_| LoadError::Section)?;
        let index = Index::from_sections(
            self.section(self.layout.nodes, counts.nodes)?,
            self.section(self.layout.values, values.saturating_add(1))?,
            len,
        );
        index.ok_or(LoadError::Section)
    }
}

/// Logs why tables are not used.
pub(super) fn refused(error: &LoadError) {
    ratelimited_log::warn(format_args!(
        "cannot use the image tables in the cache; reading the layers instead: {}",
        reason(error)
    ));
}
