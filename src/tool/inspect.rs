//! `ovbd inspect`: describes the layers of a disk, as a table or as JSON.

use std::{fmt, iter};

use serde::Serialize;
use uuid::Uuid;

use super::loaded_stack::{Content, LoadedStack, WritableLayerReader};
use super::table::{Align, Table, count, percent as in_percent, ratio, size};
use crate::format::lsmt::HEADER_LEN;
use crate::image::Image;
use crate::image::layer::Layer;
use crate::image::made_upon::MadeUpon;
use crate::source::LayerRef;
use crate::units::{SECTOR_SIZE, Sectors};

/// Description of a disk. Field names are those of the JSON; sizes are in bytes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Inspection {
    /// Size of the disk.
    pub virtual_size: u64,
    /// Number of pieces of the disk: segments of the merged index, extents of the writable layer.
    pub segments: u64,
    /// Bytes of the disk that a layer zeroes.
    pub zeroed: u64,
    /// Bytes of the disk without a mapping.
    pub unmapped: u64,
    /// The layers, bottom first.
    pub layers: Vec<LayerInfo>,
    /// The writable layer above them.
    pub upper: Option<UpperInfo>,
}

/// Description of a writable layer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct UpperInfo {
    /// The data file.
    pub data: String,
    /// The index file.
    pub index: String,
    /// Placement of data: `append`, `sparse` or `hybrid`.
    pub kind: &'static str,
    /// Size of the disk in the layer's header; 0: that of the layers below.
    pub virtual_size: u64,
    /// Uuid of the layer; null if unset.
    pub uuid: Option<Uuid>,
    /// Uuid of the parent layer; null if unset.
    pub parent_uuid: Option<Uuid>,
    /// The record of the stack that the layer was made upon, if there is one.
    pub made_upon: Option<RecordInfo>,
    /// Bytes of the data file.
    pub file_size: u64,
    /// Bytes of data that is in use.
    pub data_size: u64,
    /// Number of extents.
    pub extents: usize,
    /// Number of entries in the index file.
    pub index_entries: u64,
    /// Number of mappings that are in the journal only: the last process that wrote to it was
    /// killed.
    pub journal: usize,
    /// Number of pieces of the disk that come from it.
    pub share_segments: u64,
    /// Bytes of the disk that come from it.
    pub share: u64,
    /// `share` in percent of the disk.
    pub share_percent: f64,
}

/// Description of a layer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerInfo {
    /// Name of the layer: a path, or the URL of a blob.
    #[serde(rename = "path")]
    pub layer: LayerRef,
    /// Bytes of the file or the blob.
    pub file_size: u64,
    /// Bytes of them that were local before this program opened the layer and fetched what it reads.
    pub local_bytes: u64,
    /// Whether it is wrapped in a tar member.
    pub tar: bool,
    /// Compression; null: none.
    pub compression: Option<Compression>,
    /// Bytes of the layer, unwrapped.
    pub layer_size: u64,
    /// `layer_size` divided by `file_size`.
    pub ratio: f64,
    /// Bytes between header and index: the layer's data.
    pub data_size: u64,
    /// Size of the disk in the layer's trailer.
    pub virtual_size: u64,
    /// Uuid of the layer; null if unset.
    pub uuid: Option<Uuid>,
    /// Uuid of the parent layer; null if unset.
    pub parent_uuid: Option<Uuid>,
    /// Text of the commit message.
    pub message: String,
    /// The record of the stack that the layer was made upon, if there is one.
    pub made_upon: Option<RecordInfo>,
    /// Number of mappings in its index, without padding.
    pub mappings: usize,
    /// Number of segments of the merged index that come from the layer.
    pub share_segments: u64,
    /// Bytes of the disk that come from the layer.
    pub share: u64,
    /// `share` in percent of the disk.
    pub share_percent: f64,
}

/// The stack that a layer was made upon.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RecordInfo {
    /// Identity of the stack.
    pub stack: String,
    /// Size of its disk.
    pub size: u64,
}

impl From<MadeUpon> for RecordInfo {
    fn from(record: MadeUpon) -> Self {
        Self {
            stack: record.stack.to_string(),
            size: record.size,
        }
    }
}

/// Compression of a layer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Compression {
    /// `lz4` or `zstd`.
    pub algorithm: String,
    /// Uncompressed bytes of a block.
    pub block_size: u32,
    /// Number of blocks.
    pub blocks: u64,
    /// Bytes of all blocks as stored, checksums included.
    pub stored_size: u64,
    /// Whether each block has a checksum.
    pub checksum: bool,
    /// Whether header and block table have checksums; files of old tools have none.
    pub digest: bool,
}

/// Part of the disk that comes from one layer.
#[derive(Clone, Copy, Default)]
struct Share {
    segments: u64,
    sectors: u64,
}

/// Describes all layers of a disk. `local_bytes` are the bytes of each that were local when it was
/// opened; layers that snapshots added are local.
pub fn inspect(stack: &LoadedStack, local_bytes: &[u64]) -> Inspection {
    let size = stack.size();
    let layers = stack.image().map_or(&[][..], Image::layers);
    let mut shares = vec![Share::default(); layers.len()];
    let (mut zeroed, mut upper_share) = (Share::default(), Share::default());
    let mut segments = 0;
    for piece in stack.pieces() {
        let share = match piece.content {
            Content::Zeroed => &mut zeroed,
            Content::Layer(number) => &mut shares[usize::from(number)],
            Content::WritableLayer => &mut upper_share,
        };
        share.segments += 1;
        share.sectors += piece.range.len().0;
        segments += 1;
    }
    let local_bytes = local_bytes.iter().copied().map(Some);
    let local_bytes = local_bytes.chain(iter::repeat(None));
    let layers = layers.iter().zip(&shares).zip(local_bytes);
    let layers: Vec<_> = layers
        .map(|((layer, share), local_bytes)| look_at(layer, local_bytes, share, size))
        .collect();
    let upper = stack.upper();
    let upper = upper.map(|upper| look_at_upper(upper, &upper_share, size));
    let zeroed = bytes(&zeroed, size);
    let above = upper.as_ref().map_or(0, |upper| upper.share);
    let mapped = layers.iter().map(|layer| layer.share).sum::<u64>() + zeroed + above;
    Inspection {
        virtual_size: size,
        segments,
        zeroed,
        unmapped: size.saturating_sub(mapped),
        layers,
        upper,
    }
}

/// A share in bytes; the last sector of a disk may be partial.
fn bytes(share: &Share, size: u64) -> u64 {
    (share.sectors * SECTOR_SIZE).min(size)
}

fn named(uuid: Uuid) -> Option<Uuid> {
    (!uuid.is_nil()).then_some(uuid)
}

fn look_at_upper(upper: &WritableLayerReader, share: &Share, size: u64) -> UpperInfo {
    let extents = upper.layer().map().iter();
    let data: Sectors = extents
        .filter_map(|extent| Some(extent.data()?.len()))
        .sum();
    UpperInfo {
        data: upper.paths().data.display().to_string(),
        index: upper.paths().index.display().to_string(),
        kind: upper.layer().kind().name(),
        virtual_size: upper.layer().header().virtual_size,
        uuid: named(upper.layer().header().uuid),
        parent_uuid: named(upper.layer().header().parent_uuid),
        made_upon: upper.placed().made_upon.map(RecordInfo::from),
        file_size: upper.data_len(),
        data_size: data.bytes(),
        extents: upper.layer().map().len(),
        index_entries: upper.layer().index().entries(),
        journal: upper.layer().journal_len(),
        share_segments: share.segments,
        share: bytes(share, size),
        share_percent: percent(bytes(share, size), size),
    }
}

fn look_at(layer: &Layer, local_bytes: Option<u64>, share: &Share, size: u64) -> LayerInfo {
    let container = layer.container();
    let compression = container.zfile_map().map(|zfile_map| {
        let (header, table) = (zfile_map.header(), zfile_map.table());
        Compression {
            algorithm: header.format.algorithm.to_string(),
            block_size: header.format.block_size,
            blocks: table.blocks(),
            stored_size: table.offset(table.blocks()) - table.offset(0),
            checksum: header.format.checksum,
            digest: header.digest,
        }
    });
    let trailer = layer.trailer();
    let (text, record) = MadeUpon::split(&trailer.message);
    let file_size = container.blob().len();
    let share_bytes = bytes(share, size);
    LayerInfo {
        layer: layer.layer_ref().clone(),
        file_size,
        local_bytes: local_bytes.unwrap_or(file_size),
        tar: container.is_tar(),
        compression,
        layer_size: container.len(),
        ratio: container.len() as f64 / file_size as f64,
        data_size: trailer.index_offset - HEADER_LEN as u64,
        virtual_size: trailer.virtual_size,
        uuid: named(layer.uuid()),
        parent_uuid: named(layer.parent_uuid()),
        message: String::from_utf8_lossy(text).into_owned(),
        made_upon: record.map(RecordInfo::from),
        mappings: layer.mappings(),
        share_segments: share.segments,
        share: share_bytes,
        share_percent: percent(share_bytes, size),
    }
}

fn percent(part: u64, whole: u64) -> f64 {
    part as f64 * 100.0 / whole.max(1) as f64
}

impl fmt::Display for Inspection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let disk = self.virtual_size;
        writeln!(
            f,
            "disk of {disk} bytes ({}), {} layers, {} segments; {} zeroed, {} unmapped",
            size(disk),
            self.layers.len(),
            count(self.segments),
            in_percent(percent(self.zeroed, disk)),
            in_percent(percent(self.unmapped, disk)),
        )?;
        let mut sizes = Table::new(SIZE_COLUMNS);
        let mut names = Table::new(NAME_COLUMNS);
        for (number, layer) in self.layers.iter().enumerate() {
            sizes.add(layer.sizes(number));
            names.add(layer.names(number));
        }
        if !self.layers.is_empty() {
            write!(f, "\n{sizes}\n{names}")?;
        }
        match &self.upper {
            Some(upper) => write!(f, "\n{upper}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for UpperInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut sizes = Table::new(UPPER_SIZE_COLUMNS);
        sizes.add([
            self.kind.to_owned(),
            size(self.file_size),
            size(self.data_size),
            count(self.extents as u64),
            count(self.index_entries),
            count(self.journal as u64),
            in_percent(self.share_percent),
            self.data.clone(),
        ]);
        let mut names = Table::new(UPPER_NAME_COLUMNS);
        names.add([
            "upper".to_owned(),
            name(self.uuid),
            name(self.parent_uuid),
            self.virtual_size.to_string(),
            self.index.clone(),
        ]);
        write!(f, "{sizes}\n{names}")
    }
}

const UPPER_SIZE_COLUMNS: [(&str, Align); 8] = [
    ("upper", Align::Left),
    ("file", Align::Right),
    ("data", Align::Right),
    ("extents", Align::Right),
    ("entries", Align::Right),
    ("journal", Align::Right),
    ("share", Align::Right),
    ("data file", Align::Left),
];

const UPPER_NAME_COLUMNS: [(&str, Align); 5] = [
    ("#", Align::Left),
    ("uuid", Align::Left),
    ("parent", Align::Left),
    ("virtual size", Align::Right),
    ("index file", Align::Left),
];

fn name(uuid: Option<Uuid>) -> String {
    uuid.map_or("-".to_owned(), |uuid| uuid.to_string())
}

const SIZE_COLUMNS: [(&str, Align); 12] = [
    ("#", Align::Right),
    ("wrapper", Align::Left),
    ("codec", Align::Left),
    ("block", Align::Right),
    ("checksum", Align::Left),
    ("file", Align::Right),
    ("was local", Align::Right),
    ("layer", Align::Right),
    ("ratio", Align::Right),
    ("mappings", Align::Right),
    ("share", Align::Right),
    ("path", Align::Left),
];

const NAME_COLUMNS: [(&str, Align); 5] = [
    ("#", Align::Right),
    ("uuid", Align::Left),
    ("parent", Align::Left),
    ("virtual size", Align::Right),
    ("message", Align::Left),
];

impl LayerInfo {
    fn sizes(&self, number: usize) -> [String; 12] {
        let wrapper = match (self.tar, self.compression.is_some()) {
            (true, true) => "tar, zfile",
            (true, false) => "tar",
            (false, true) => "zfile",
            (false, false) => "-",
        };
        let absent = || "-".to_owned();
        let (codec, block, checksum) = match &self.compression {
            None => (absent(), absent(), absent()),
            Some(compression) => (
                compression.algorithm.clone(),
                compression.block_size.to_string(),
                if compression.checksum { "yes" } else { "no" }.to_owned(),
            ),
        };
        [
            number.to_string(),
            wrapper.to_owned(),
            codec,
            block,
            checksum,
            size(self.file_size),
            size(self.local_bytes),
            size(self.layer_size),
            ratio(self.ratio),
            count(self.mappings as u64),
            in_percent(self.share_percent),
            self.layer.to_string(),
        ]
    }

    fn names(&self, number: usize) -> [String; 5] {
        [
            number.to_string(),
            name(self.uuid),
            name(self.parent_uuid),
            self.virtual_size.to_string(),
            self.message.clone(),
        ]
    }
}
