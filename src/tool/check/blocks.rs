//! Reads all of a layer on many threads, and decodes its blocks.

use std::num::NonZero;
use std::ops::Range;
use std::thread;

use indicatif::ProgressBar;

use super::super::Error;
use super::super::in_order::InOrder;
use super::container::{PieceReader, Unreadable, place};
use super::findings::Findings;
use super::layout::Layout;
use crate::image::Container;

/// Bytes of the layer per job; a multiple of each block size.
const JOB_LEN: u64 = 512 * 1024;

/// Broken pieces after which the rest of a layer is not read: a hostile file can have very many blocks in
/// a hole.
const MAX_LOST: usize = 1000;

/// A piece of the layer that cannot be read.
struct Lost {
    /// Its range in the layer.
    bytes: Range<u64>,
    why: Unreadable,
}

/// Reports each piece of the layer that cannot be read, and the sectors that it affects.
pub(super) fn check(
    container: &Container,
    layout: &Layout,
    threads: NonZero<usize>,
    progress: &ProgressBar,
    findings: &mut Findings<'_>,
) -> Result<(), Error> {
    let end = layout.checkable(container);
    progress.set_length(end);
    progress.set_position(0);
    thread::scope(|scope| {
        let worker = || {
            let mut reader = PieceReader::default();
            move |range| read(container, &mut reader, range)
        };
        let mut jobs = InOrder::start(scope, threads, worker)?;
        let mut count = 0;
        let mut tell = |lost: Vec<Lost>, count: &mut usize| {
            *count += lost.len();
            for Lost { bytes, why } in lost {
                let place = place(container, bytes.start);
                findings.broken_at(place, &why, &layout.affected(bytes))?;
            }
            Ok::<_, Error>(())
        };
        let mut at = container.data_from(0);
        while at < end && count < MAX_LOST {
            progress.set_position(at);
            let range = at..end.min(at + JOB_LEN);
            at = container.data_from(range.end);
            if let Some(lost) = jobs.push(range)? {
                tell(lost, &mut count)?;
            }
        }
        while let Some(lost) = jobs.pop()? {
            tell(lost, &mut count)?;
        }
        if at < end {
            let what = format!("{count} broken blocks: the rest of the layer was skipped");
            findings.note(None, what)?;
        }
        Ok(())
    })
}

/// Reads a range of the layer; returns the pieces that cannot be read.
fn read(container: &Container, reader: &mut PieceReader, range: Range<u64>) -> Vec<Lost> {
    let Some(zfile_map) = container.zfile_map() else {
        let mut buffer = vec![0; (range.end - range.start) as usize];
        let result = reader.read(container, range.start, &mut buffer);
        let lost = result.err().map(|why| Lost { bytes: range, why });
        return lost.into_iter().collect();
    };
    let block_size = u64::from(zfile_map.header().format.block_size);
    let blocks = range.start / block_size..range.end.div_ceil(block_size);
    blocks
        .filter_map(|block| {
            let why = reader.block(container, zfile_map, block).err()?;
            let start = block * block_size;
            Some(Lost {
                bytes: start..range.end.min(start + block_size),
                why,
            })
        })
        .collect()
}
