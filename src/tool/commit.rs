//! `ovbd commit`: makes a sealed layer of a writable layer.

use std::fs;
use std::num::NonZero;
use std::thread;

use indicatif::ProgressBar;
use uuid::Uuid;

use super::Error;
use super::layer_writer::{LayerFormat, LayerWriter, Written, message};
use super::loaded_stack::{Content, LoadedStack, WritableLayerReader};
use super::output::{self, NewFile};
use crate::format::lsmt::{ENTRY_LEN, MAX_ENTRIES};
use crate::format::zfile::BlockFormat;
use crate::image::reader::Reader;
use crate::units::Sector;
use crate::writable::Paths;
use crate::writable::extent_map::ExtentMap;
use crate::writable::manifest::Pairs;

/// Largest index file, in bytes, whose extents are kept in the order of their writes.
const MAX_APART: u64 = 4_000_000 * ENTRY_LEN as u64;

/// The layer to make.
#[derive(Clone, Debug)]
pub struct Commit {
    /// The writable layer. No process may have it open.
    pub upper: Paths,
    /// Format of compressed blocks. `None`: no compression.
    pub blocks: Option<BlockFormat>,
    /// Whether the layer is wrapped in tar.
    pub tar: bool,
    /// Uuid of the layer. `None`: that of the writable layer.
    pub uuid: Option<Uuid>,
    /// Uuid of the parent layer. `None`: that of the writable layer's parent.
    pub parent_uuid: Option<Uuid>,
    /// Text of the commit message.
    pub message: String,
    /// Number of threads that read and compress.
    pub threads: NonZero<usize>,
}

/// Makes a layer of the content of a writable layer, which does not change. The output does not
/// depend on the number of threads.
///
/// # Errors
/// [`Error::Upper`] if the writable layer cannot be used; those of [`write`].
pub fn commit(task: &Commit, file: NewFile, progress: &ProgressBar) -> Result<Written, Error> {
    Pairs::refuse_frozen(&task.upper)?;
    // Upstream joins neighbours up to a length only, so its result depends on the order of the
    // writes. For an index with very many entries, memory matters more.
    let index = fs::metadata(&task.upper.index);
    let map = match index.is_ok_and(|index| index.len() > MAX_APART) {
        true => ExtentMap::new(),
        false => ExtentMap::apart(),
    };
    let upper = WritableLayerReader::open(&task.upper, map)?;
    let format = LayerFormat {
        blocks: task.blocks,
        tar: task.tar,
        uuid: task.uuid.unwrap_or(upper.layer().header().uuid),
        parent_uuid: task
            .parent_uuid
            .unwrap_or(upper.layer().header().parent_uuid),
        message: message(&task.message, upper.placed().made_upon)?,
    };
    write(
        &LoadedStack::of(None, Some(upper)),
        file,
        format,
        task.threads,
        progress,
    )
}

/// Writes the content of all layers of a disk as one layer.
///
/// # Errors
/// [`Error::OutputIsInput`] and [`Error::TooManyMappings`]; others if something cannot be read or written.
pub fn write(
    stack: &LoadedStack,
    file: NewFile,
    format: LayerFormat,
    threads: NonZero<usize>,
    progress: &ProgressBar,
) -> Result<Written, Error> {
    output::refuse_inputs(file.target(), stack.inputs())?;
    // Finding this out later would cost the copying.
    if least_mappings(stack) > MAX_ENTRIES {
        return Err(Error::TooManyMappings {
            path: file.target().to_owned(),
        });
    }
    progress.set_length(stack.size());
    let fetch = || {
        let mut reader = Reader::new();
        move |from: u64, into: &mut [u8]| stack.read(&mut reader, Sector::containing(from), into)
    };
    thread::scope(|scope| {
        let mut layer =
            LayerWriter::start(scope, threads, file, format, Some(stack.size()), fetch)?;
        for piece in stack.all_pieces() {
            let range = piece.range;
            match piece.content {
                Content::Zeroed => layer.zeroed(range)?,
                Content::Layer(_) | Content::WritableLayer => {
                    layer.fetched(range.start(), range.len().0, range.start().byte())?;
                }
            }
            progress.set_position(range.end().byte());
        }
        layer.finish(stack.size())
    })
}

/// Number of runs of sectors with data, and of zeroed ones. A layer has at least one mapping for
/// each, and more for long ones only.
pub fn least_mappings(stack: &LoadedStack) -> u64 {
    let (mut count, mut last) = (0, None);
    for piece in stack.all_pieces() {
        let zeroed = piece.content == Content::Zeroed;
        count += u64::from(last != Some((piece.range.start(), zeroed)));
        last = Some((piece.range.end(), zeroed));
    }
    count
}
