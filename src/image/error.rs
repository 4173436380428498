//! Why an image cannot be opened or read.

use std::time::Duration;

use thiserror::Error;
use uuid::Uuid;

use super::identity::StackId;
use super::segment::{MAX_LAYERS, MAX_MAPPINGS, MAX_MOFFSET};
use crate::format::foreign::Foreign;
use crate::format::{lsmt, tar, zfile};
use crate::source::LayerRef;
use crate::units::{Sector, Sectors};
use crate::{codec, source};

/// Why an image cannot be opened or read. Names the file and the offset in it.
#[derive(Debug, Error)]
pub enum Error {
    /// A layer's file cannot be opened or read.
    #[error(transparent)]
    Source(#[from] source::Error),
    /// The bytes of a layer from a registry break a rule of its format, also after they were fetched again.
    #[error("the registry serves bytes that are no valid layer, also when they are fetched again")]
    Served {
        /// The rule.
        source: Box<Self>,
    },
    /// The file has another format, such as qcow2.
    #[error("{layer} {kind}; expected an OverlayBD layer: {}", kind.hint())]
    Foreign {
        /// The layer.
        layer: LayerRef,
        /// Format of the file.
        kind: Foreign,
    },
    /// The tar wrapper is broken.
    #[error("{layer}: broken tar wrapper")]
    Tar {
        /// The layer.
        layer: LayerRef,
        /// Error of the wrapper.
        source: tar::Error,
    },
    /// The tar member is longer than the file.
    #[error(
        "{layer}: the tar header announces {len} bytes at byte {offset}; the file has \
         {file_len} bytes and may be truncated"
    )]
    TarPayload {
        /// The layer.
        layer: LayerRef,
        /// Start of the payload.
        offset: u64,
        /// Length of the payload in the header.
        len: u64,
        /// Length of the file.
        file_len: u64,
    },
    /// The ZFile is broken.
    #[error("{layer}: broken ZFile, byte {offset}")]
    ZFile {
        /// The layer.
        layer: LayerRef,
        /// Byte of the file at which the broken structure starts.
        offset: u64,
        /// Error of the structure.
        source: zfile::Error,
    },
    /// The content is too short for a layer.
    #[error("{layer}: content has {found} bytes; a layer has at least 8192")]
    TooShort {
        /// The layer.
        layer: LayerRef,
        /// Length of the content inside the wrappers.
        found: u64,
    },
    /// The content is not a valid layer.
    #[error("{layer}: not a valid layer, byte {offset} (after unwrapping)")]
    Lsmt {
        /// The layer.
        layer: LayerRef,
        /// Byte of the content at which the broken structure starts.
        offset: u64,
        /// Error of the structure.
        source: lsmt::Error,
    },
    /// The layer is writable and not sealed, and no process has it open.
    #[error(
        "{layer}: expected a sealed layer, found a writable or truncated one; seal it with `ovbd seal` or `ovbd commit`, or start the disk that took the snapshot"
    )]
    Unsealed {
        /// The layer.
        layer: LayerRef,
    },
    /// The layer is writable, and a process has it open and does not seal it.
    #[error("{layer} was not sealed within {} s and is in use; take a snapshot with `ovbd ctl SOCKET snapshot NAME`", waited.as_secs())]
    InUse {
        /// The layer.
        layer: LayerRef,
        /// Time waited for the seal.
        waited: Duration,
    },
    /// Data is at a sector beyond the limit of the merged index.
    #[error(
        "{layer}: data of {offset} of the disk is at {moffset} of the layer; at most \
         {MAX_MOFFSET} is supported"
    )]
    Position {
        /// The layer.
        layer: LayerRef,
        /// Sector of the disk.
        offset: Sector,
        /// Sector of the layer.
        moffset: Sector,
    },
    /// A compressed block is damaged.
    #[error("{layer}: damaged block {block}, byte {offset}")]
    Block {
        /// The layer.
        layer: LayerRef,
        /// Number of the block.
        block: u64,
        /// Byte of the file at which the block starts.
        offset: u64,
        /// Error of the block.
        source: BlockError,
    },
    /// The layer below is not the one that this layer was made upon.
    #[error(
        "{layer} has parent {parent}, but is above {below}, which has uuid {found}: name every \
         layer of the stack, bottom first; --force uses this order"
    )]
    WrongParent {
        /// The layer.
        layer: LayerRef,
        /// Uuid of its parent.
        parent: Uuid,
        /// The layer below it.
        below: LayerRef,
        /// Uuid of the layer below it.
        found: Uuid,
    },
    /// The stack below is not the one that the layer was made upon.
    #[error(
        "{layer} was made for a stack with identity {made_upon}, but is above a stack with identity \
         {found}: name the layers that it was made for; --force uses these layers"
    )]
    WrongStack {
        /// The layer.
        layer: LayerRef,
        /// Identity of the stack it was made upon.
        made_upon: StackId,
        /// Identity of the stack below it.
        found: StackId,
    },
    /// The stack below has another size than the one that the layer was made upon, although the uuids match.
    #[error(
        "{layer} was made for a disk of {made_upon} bytes, but the layers below it have {found} \
         bytes: name the layers that it was made for; --force uses these layers"
    )]
    WrongSize {
        /// The layer.
        layer: LayerRef,
        /// Size in bytes of the disk it was made upon.
        made_upon: u64,
        /// Size in bytes of the disk below it.
        found: u64,
    },
    /// The layer was made upon other layers, and none is below it.
    #[error(
        "{layer} was made for a stack of layers, but no layer is below it: name every layer of the \
         stack, bottom first; --force uses it alone"
    )]
    NoParent {
        /// The layer.
        layer: LayerRef,
    },
    /// The layer is below the one it was made upon.
    #[error(
        "{layer} has parent {parent}, but is below it ({above}): name the layers bottom first; \
         --force uses this order"
    )]
    WrongOrder {
        /// The layer.
        layer: LayerRef,
        /// Uuid of its parent.
        parent: Uuid,
        /// The layer with that uuid.
        above: LayerRef,
    },
    /// The stack has no layers.
    #[error("an image needs at least one layer")]
    NoLayers,
    /// The number of layers exceeds the limit.
    #[error("{0} layers; at most {MAX_LAYERS} are supported")]
    TooManyLayers(usize),
    /// The number of mappings of all layers exceeds the limit.
    #[error("more than {MAX_MAPPINGS} mappings in all layers together")]
    TooManyMappings,
    /// No layer declares a size.
    #[error("all layers have virtual size 0; expected at least one above 0")]
    NoSize,
    /// The mapped image tables are no longer what they were.
    #[error(
        "the image tables in the cache were truncated, or their storage failed: restart the daemon, \
         which rebuilds them"
    )]
    TablesLost,
    /// The range of a read ends past the disk.
    #[error("read of {len} bytes at {start} is past the end of the disk, which has {sectors}")]
    Beyond {
        /// First sector wanted.
        start: Sector,
        /// Bytes wanted.
        len: usize,
        /// Size of the disk.
        sectors: Sectors,
    },
}

impl Error {
    /// Whether the bytes of a layer do not follow the rules of its format.
    pub(super) const fn breaks_format(&self) -> bool {
        matches!(
            self,
            Self::Foreign { .. }
                | Self::Tar { .. }
                | Self::TarPayload { .. }
                | Self::ZFile { .. }
                | Self::TooShort { .. }
                | Self::Lsmt { .. }
                | Self::Unsealed { .. }
                | Self::Block { .. }
        )
    }
}

/// Why a compressed block cannot be decoded.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BlockError {
    /// The checksum does not match.
    #[error("checksum is {found:#010x}; expected {expected:#010x}")]
    Checksum {
        /// CRC of the stored bytes.
        found: u32,
        /// Checksum that follows them.
        expected: u32,
    },
    /// The codec reports an error.
    #[error(transparent)]
    Codec(#[from] codec::Error),
    /// Stored bytes are missing.
    #[error("stored bytes are missing")]
    Missing,
}
