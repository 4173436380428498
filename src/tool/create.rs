//! `ovbd create`: makes a sealed layer of a raw image, with or without parent layers.
//!
//! The image is read in order and cut into units. Threads compare: without parents, units of zeros
//! are dropped; with parents, units that are equal to the parent's. The remaining units go to the
//! layer writer.

use std::num::NonZero;
use std::sync::Arc;
use std::thread;

use indicatif::ProgressBar;
use uuid::Uuid;

use super::Error;
use super::in_order::InOrder;
use super::layer_writer::{LayerFormat, LayerWriter, Written, message};
use super::name::hashed;
use super::output::{self, NewFile};
use super::raw_image::{RawImage, RawRange, Source};
use super::unit::{CHUNK, UNIT, data_from, is_zero};
use crate::format::zfile::BlockFormat;
use crate::image::Image;
use crate::image::reader::Reader;
use crate::units::{SECTOR_SIZE, Sector, SectorRange, Sectors};

/// Sectors of a unit.
const UNIT_SECTORS: u16 = (UNIT as u64 / SECTOR_SIZE) as u16;

/// The layer to make.
#[derive(Clone, Debug)]
pub struct Create {
    /// Whether an input that looks like an image of another format is taken as raw.
    pub raw: bool,
    /// Format of compressed blocks. `None`: no compression.
    pub blocks: Option<BlockFormat>,
    /// Whether the layer is wrapped in tar.
    pub tar: bool,
    /// Uuid of the layer. `None`: derived from the parent's uuid, the message, and size and samples of
    /// the raw image.
    pub uuid: Option<Uuid>,
    /// Text of the commit message.
    pub message: String,
    /// Number of threads that compare and compress.
    pub threads: NonZero<usize>,
}

/// Makes a layer. The output does not depend on the number of threads, nor on whether the image is
/// a file or a stream. The disk gets the size of the raw image.
///
/// With a `parent`, only what differs from it is stored.
///
/// # Errors
/// [`Error::Foreign`] and [`Error::OutputIsInput`] for inputs that are refused; others if something cannot
/// be read or written.
pub fn create(
    mut raw: RawImage,
    parent: Option<&Image>,
    task: &Create,
    file: NewFile,
    progress: &ProgressBar,
) -> Result<Written, Error> {
    if !task.raw {
        raw.refuse_foreign()?;
    }
    let inputs = parent.map_or(&[][..], Image::layers).iter();
    let inputs = inputs.filter_map(|layer| layer.container().blob().metadata().ok());
    output::refuse_inputs(file.target(), inputs.chain(raw.file().metadata().ok()))?;
    if let Some(len) = raw.size() {
        progress.set_length(len);
    }
    let format = format_of(task, parent, &mut raw)?;
    thread::scope(|scope| {
        // All data is in memory when it is given to the writer.
        let fetch = || |_: u64, _: &mut [u8]| Ok(());
        let layer = LayerWriter::start(scope, task.threads, file, format, raw.size(), fetch)?;
        let source = raw.source();
        let differ = || {
            let mut differ = Differ::new(parent, Arc::clone(&source));
            move |chunk| differ.sort(chunk)
        };
        let mut sink = Sink {
            layer,
            jobs: InOrder::start(scope, task.threads, differ)?,
            spare: Vec::new(),
        };
        sink.take_all(&mut raw, parent, progress)?;
        sink.finish(raw.position())
    })
}

/// Format and uuids of the new layer.
fn format_of(
    task: &Create,
    parent: Option<&Image>,
    raw: &mut RawImage,
) -> Result<LayerFormat, Error> {
    let parent_uuid = parent
        .and_then(|parent| parent.layers().last())
        .map_or(Uuid::nil(), |top| top.uuid());
    let uuid = match task.uuid {
        Some(uuid) => uuid,
        None => derived_uuid(parent_uuid, &task.message, raw)?,
    };
    let record = parent.map(Image::made_upon).transpose()?.flatten();
    Ok(LayerFormat {
        blocks: task.blocks,
        tar: task.tar,
        uuid,
        parent_uuid,
        message: message(&task.message, record)?,
    })
}

/// A uuid that is the same for the same layer and differs from the parent's. It depends only on
/// what is known when the first block of the layer is written.
fn derived_uuid(parent: Uuid, message: &str, raw: &mut RawImage) -> Result<Uuid, Error> {
    let head = raw.head()?;
    let spread = raw.spread()?;
    Ok(hashed(&[
        parent.as_bytes(),
        message.as_bytes(),
        &head,
        &spread,
    ]))
}

/// A chunk of the new disk, which starts at the start of a unit.
struct Chunk {
    offset: u64,
    bytes: Vec<u8>,
    /// Whether the bytes must still be read.
    unread: bool,
}

/// Result of a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    /// The unit equals that of the parent; without a parent, it is zero.
    Same,
    /// The unit is stored.
    Data,
    /// The unit is zero, and is not zero in the parent.
    Zeroed,
}

/// Compares chunks with the parent.
struct Differ<'p> {
    parent: Option<&'p Image>,
    source: Arc<Source>,
    reader: Reader,
    /// Content of the parent at the place of the chunk.
    below: Vec<u8>,
}

impl<'p> Differ<'p> {
    fn new(parent: Option<&'p Image>, source: Arc<Source>) -> Self {
        Self {
            parent,
            source,
            reader: Reader::new(),
            below: Vec::new(),
        }
    }

    /// Returns the chunk in whole sectors, and the result for each of its units.
    fn sort(&mut self, mut chunk: Chunk) -> Result<(Chunk, Vec<Unit>), Error> {
        let sector = SECTOR_SIZE as usize;
        let bytes = &mut chunk.bytes;
        if chunk.unread {
            self.source.read_at(bytes, chunk.offset)?;
        }
        bytes.resize(bytes.len().next_multiple_of(sector), 0);
        self.below.clear();
        if let Some(parent) = self.parent {
            // Only sectors that lie wholly on the parent's disk can be compared.
            let known = (parent.size() / SECTOR_SIZE * SECTOR_SIZE).saturating_sub(chunk.offset);
            self.below.resize(known.min(bytes.len() as u64) as usize, 0);
            if !self.below.is_empty() {
                let start = Sector(chunk.offset / SECTOR_SIZE);
                self.reader
                    .read(parent.at_own_size(), start, &mut self.below)?;
            }
        }
        let units = (0..).step_by(UNIT).zip(bytes.chunks(UNIT));
        let units = units.map(|(at, unit)| {
            let is_zero = is_zero(unit);
            let same = match (self.parent, self.below.get(at..at + unit.len())) {
                (None, _) => is_zero,
                (Some(_), Some(below)) => below == unit,
                // On a disk larger than the parent's, old data beyond the parent's end would come
                // back.
                (Some(parent), None) => {
                    let start = chunk.offset + at as u64;
                    is_zero && data_from(parent, start, start + unit.len() as u64).is_none()
                }
            };
            match (same, is_zero) {
                (true, _) => Unit::Same,
                (false, true) => Unit::Zeroed,
                (false, false) => Unit::Data,
            }
        });
        let units = units.collect();
        Ok((chunk, units))
    }
}

type Sorted = Result<(Chunk, Vec<Unit>), Error>;

/// Takes chunks, and writes the units that are stored to the layer.
struct Sink {
    layer: LayerWriter,
    jobs: InOrder<Chunk, Sorted>,
    spare: Vec<Vec<u8>>,
}

impl Sink {
    /// Reads and compares all of an image.
    fn take_all(
        &mut self,
        raw: &mut RawImage,
        parent: Option<&Image>,
        progress: &ProgressBar,
    ) -> Result<(), Error> {
        loop {
            let buffer = self.spare.pop().unwrap_or_default();
            match raw.next(buffer)? {
                Some(RawRange::Data {
                    offset,
                    bytes,
                    unread,
                }) => self.push(Chunk {
                    offset,
                    bytes,
                    unread,
                })?,
                Some(RawRange::Hole { offset, len }) => {
                    if let Some(parent) = parent {
                        self.hide(parent, offset, offset + len)?;
                    }
                }
                None => return Ok(()),
            }
            progress.set_position(raw.position());
        }
    }

    fn push(&mut self, chunk: Chunk) -> Result<(), Error> {
        match self.jobs.push(chunk)? {
            Some(done) => self.store(done?),
            None => Ok(()),
        }
    }

    /// Hides the parent's data in a hole of the new disk.
    fn hide(&mut self, parent: &Image, mut offset: u64, end: u64) -> Result<(), Error> {
        while let Some(data) = data_from(parent, offset, end) {
            let start = data / UNIT as u64 * UNIT as u64;
            let len = (end - start).min(CHUNK as u64);
            let mut bytes = self.spare.pop().unwrap_or_default();
            bytes.clear();
            bytes.resize(len as usize, 0);
            offset = start + len;
            let chunk = Chunk {
                offset: start,
                bytes,
                unread: false,
            };
            self.push(chunk)?;
        }
        Ok(())
    }

    fn store(&mut self, (chunk, units): (Chunk, Vec<Unit>)) -> Result<(), Error> {
        let first = chunk.offset / SECTOR_SIZE;
        let offsets = (first..).step_by(usize::from(UNIT_SECTORS)).map(Sector);
        for ((unit, offset), bytes) in units.iter().zip(offsets).zip(chunk.bytes.chunks(UNIT)) {
            match unit {
                Unit::Same => {}
                Unit::Data => self.layer.data(offset, bytes)?,
                Unit::Zeroed => {
                    let sectors = Sectors::whole_in(bytes.len() as u64);
                    self.layer
                        .zeroed(SectorRange::new(offset, offset + sectors))?;
                }
            }
        }
        self.spare.push(chunk.bytes);
        Ok(())
    }

    fn finish(mut self, virtual_size: u64) -> Result<Written, Error> {
        while let Some(done) = self.jobs.pop()? {
            self.store(done?)?;
        }
        self.layer.finish(virtual_size)
    }
}
