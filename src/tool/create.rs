//! `ovbd create`: a sealed layer from a raw image, on nothing or on a stack of layers.
//!
//! The image is read in order and cut into units; threads find out what to keep of each chunk:
//! what is not zero, or, on a stack, what differs from it. What is kept goes to the layer writer.

use std::num::NonZero;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use indicatif::ProgressBar;
use uuid::Uuid;

use super::Error;
use super::in_order::InOrder;
use super::layer_writer::{LayerFormat, LayerWriter, Written};
use super::name::hashed;
use super::output;
use super::raw_image::{Input, Part, RawImage, Source};
use super::unit::{CHUNK, UNIT, data_from, is_zero};
use crate::format::zfile::BlockFormat;
use crate::image::Image;
use crate::image::config::Stack;
use crate::image::reader::Reader;
use crate::units::{SECTOR_SIZE, Sector};

/// Sectors of a unit.
const UNIT_SECTORS: u16 = (UNIT as u64 / SECTOR_SIZE) as u16;

/// What to make a layer of, and how.
#[derive(Clone, Debug)]
pub struct Create {
    /// The raw image.
    pub from: Input,
    /// File to be written; one that exists is replaced.
    pub to: PathBuf,
    /// Whether an input that looks like an image of another format is taken as raw.
    pub raw: bool,
    /// The stack below the new layer: only what differs from it is stored.
    pub parent: Option<Stack>,
    /// How blocks are compressed; `None`: the layer is not compressed.
    pub blocks: Option<BlockFormat>,
    /// Whether to wrap it in a tar member.
    pub tar: bool,
    /// Name of the layer; `None`: one made from the parent's, the message and the first MiB.
    pub uuid: Option<Uuid>,
    /// Commit message, of at most 256 bytes.
    pub message: String,
    /// Threads that compare and compress.
    pub threads: NonZero<usize>,
}

/// Makes a layer. The output does not depend on the number of threads, nor on whether the image
/// comes from a file or a stream.
///
/// The disk becomes as large as the raw image, be that more or less than the parent.
///
/// # Errors
/// Something cannot be read or written; there is no output then.
pub fn create(task: &Create, progress: &ProgressBar) -> Result<Written, Error> {
    let mut raw = RawImage::open(&task.from)?;
    if !task.raw {
        raw.refuse_foreign()?;
    }
    let parent = task.parent.as_ref().map(Image::open).transpose()?;
    let parent = parent.as_ref();
    let inputs = parent.map_or(&[][..], Image::layers).iter();
    let inputs = inputs.filter_map(|layer| layer.container().blob().metadata().ok());
    output::refuse_inputs(&task.to, inputs.chain(raw.file().metadata().ok()))?;
    if let Some(len) = raw.size() {
        progress.set_length(len);
    }
    let format = format_of(task, parent, &mut raw)?;
    thread::scope(|scope| {
        // All data is in memory when its place is known.
        let fetch = || |_: u64, _: &mut [u8]| Ok(());
        let layer = LayerWriter::start(scope, task.threads, &task.to, format, raw.size(), fetch)?;
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

/// How the new layer is stored, and its names.
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
        None => derived_uuid(parent_uuid, &task.message, &raw.head()?),
    };
    Ok(LayerFormat {
        blocks: task.blocks,
        tar: task.tar,
        uuid,
        parent_uuid,
        message: task.message.clone().into_bytes(),
    })
}

/// A name that is the same whenever the same layer is made, and differs from the parent's: by what
/// is known when the layer's first block is written.
fn derived_uuid(parent: Uuid, message: &str, head: &[u8]) -> Uuid {
    hashed(&[parent.as_bytes(), message.as_bytes(), head])
}

/// A chunk of the new disk, which starts at a whole unit.
struct Chunk {
    offset: u64,
    bytes: Vec<u8>,
    /// Whether the bytes are still to be read.
    unread: bool,
}

/// What becomes of a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    /// It is as it was, or zero upon nothing.
    Same,
    /// Its data goes into the layer.
    Data,
    /// It became zero.
    Zeroed,
}

/// Tells what to keep of a chunk.
struct Differ<'p> {
    parent: Option<&'p Image>,
    source: Arc<Source>,
    reader: Reader,
    /// What the parent holds where the chunk is.
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

    /// The chunk in whole sectors, and what becomes of each of its units.
    fn sort(&mut self, mut chunk: Chunk) -> Result<(Chunk, Vec<Unit>), Error> {
        let sector = SECTOR_SIZE as usize;
        let bytes = &mut chunk.bytes;
        if chunk.unread {
            self.source.read_at(bytes, chunk.offset)?;
        }
        bytes.resize(bytes.len().next_multiple_of(sector), 0);
        self.below.clear();
        if let Some(parent) = self.parent {
            // Of the parent's disk, only sectors that lie wholly on it can be compared.
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
                // On a larger disk than the parent's, old data beyond its end would come back.
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

/// Takes chunks, and lets what is to be kept of them end up in the layer.
struct Sink {
    layer: LayerWriter,
    jobs: InOrder<Chunk, Sorted>,
    spare: Vec<Vec<u8>>,
}

impl Sink {
    /// Takes all of an image.
    fn take_all(
        &mut self,
        raw: &mut RawImage,
        parent: Option<&Image>,
        progress: &ProgressBar,
    ) -> Result<(), Error> {
        loop {
            let buffer = self.spare.pop().unwrap_or_default();
            match raw.next(buffer)? {
                Some(Part::Data {
                    offset,
                    bytes,
                    unread,
                }) => self.push(Chunk {
                    offset,
                    bytes,
                    unread,
                })?,
                Some(Part::Hole { offset, len }) => {
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

    /// Hides what the parent has in a hole of the new disk.
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
                    let sectors = bytes.len() as u64 / SECTOR_SIZE;
                    self.layer.zeroed(offset, sectors as u16)?;
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
