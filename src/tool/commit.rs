//! `ovbd commit`: a sealed layer from a writable one.

use std::fs;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::thread;

use indicatif::ProgressBar;
use uuid::Uuid;

use super::Error;
use super::disk::{Content, Disk, Upper};
use super::layer_writer::{LayerFormat, LayerWriter, Written};
use super::output;
use crate::format::lsmt::{ENTRY_LEN, MAX_ENTRIES, MAX_LENGTH};
use crate::format::zfile::BlockFormat;
use crate::image::reader::Reader;
use crate::units::{Sector, Sectors};
use crate::writable::Paths;
use crate::writable::extent_map::ExtentMap;
use crate::writable::manifest::Pairs;

/// Bytes of an index up to which its pieces are kept apart as they arrived.
const MAX_APART: u64 = 4_000_000 * ENTRY_LEN as u64;

/// What to make a layer of, and how.
#[derive(Clone, Debug)]
pub struct Commit {
    /// The writable layer. No process may have it open.
    pub upper: Paths,
    /// File to be written; one that exists is replaced.
    pub to: PathBuf,
    /// How blocks are compressed; `None`: the layer is not compressed.
    pub blocks: Option<BlockFormat>,
    /// Whether to wrap it in a tar member.
    pub tar: bool,
    /// Name of the layer; `None`: the upper's.
    pub uuid: Option<Uuid>,
    /// Name of the layer below; `None`: as the upper says.
    pub parent_uuid: Option<Uuid>,
    /// Commit message, of at most 256 bytes.
    pub message: String,
    /// Threads that read and compress.
    pub threads: NonZero<usize>,
}

/// Makes a layer of what the upper holds, which stays as it is. The output does not depend on the
/// number of threads.
///
/// # Errors
/// Something cannot be read or written; there is no output then.
pub fn commit(task: &Commit, progress: &ProgressBar) -> Result<Written, Error> {
    Pairs::refuse_frozen(&task.upper)?;
    // Upstream joins neighbours only up to a length, so what it makes of them depends on how they
    // arrived. For an index with very many entries we would rather save the memory.
    let index = fs::metadata(&task.upper.index);
    let map = match index.is_ok_and(|index| index.len() > MAX_APART) {
        true => ExtentMap::new(),
        false => ExtentMap::apart(),
    };
    let upper = Upper::open(&task.upper, map)?;
    let format = LayerFormat {
        blocks: task.blocks,
        tar: task.tar,
        uuid: task.uuid.unwrap_or(upper.header.uuid),
        parent_uuid: task.parent_uuid.unwrap_or(upper.header.parent_uuid),
        message: task.message.clone().into_bytes(),
    };
    write(
        &Disk::of(None, Some(upper)),
        &task.to,
        format,
        task.threads,
        progress,
    )
}

/// Writes all that the layers of a disk hold as one layer.
///
/// # Errors
/// As [`commit`].
pub fn write(
    disk: &Disk,
    to: &Path,
    format: LayerFormat,
    threads: NonZero<usize>,
    progress: &ProgressBar,
) -> Result<Written, Error> {
    output::refuse_inputs(to, disk.inputs())?;
    // To find out later would cost the copying of most of it.
    if runs(disk) > MAX_ENTRIES {
        return Err(Error::TooManyMappings {
            path: to.to_owned(),
        });
    }
    progress.set_length(disk.size());
    let fetch = || {
        let mut reader = Reader::new();
        move |from: u64, into: &mut [u8]| disk.read(&mut reader, Sector::containing(from), into)
    };
    thread::scope(|scope| {
        let mut layer = LayerWriter::start(scope, threads, to, format, Some(disk.size()), fetch)?;
        for piece in disk.all_pieces() {
            let range = piece.range;
            match piece.content {
                Content::Zeroed => {
                    for step in range.steps(Sectors(MAX_LENGTH.into())) {
                        layer.zeroed(step.start(), step.len().0 as u16)?;
                    }
                }
                Content::Layer(_) | Content::Upper => {
                    layer.fetched(range.start(), range.len().0, range.start().byte())?;
                }
            }
            progress.set_position(range.end().byte());
        }
        layer.finish(disk.size())
    })
}

/// Runs of sectors that hold something, or are zeroed. A layer has a mapping for each at least, and
/// no more unless they are long.
pub fn runs(disk: &Disk) -> u64 {
    let (mut count, mut last) = (0, None);
    for piece in disk.all_pieces() {
        let zeroed = piece.content == Content::Zeroed;
        count += u64::from(last != Some((piece.range.start(), zeroed)));
        last = Some((piece.range.end(), zeroed));
    }
    count
}
