//! Blocking reads of an image or a layer, for tools and for loading layers.
#![cfg_attr(
    not(test),
    warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)
)]

use super::container::Container;
use super::error::Error;
use super::pieces::{CompressedRun, Piece, SizedImage};
use super::unpack::Unpacker;
use crate::io::scatter::{Cursor, Scatter};
use crate::units::{SECTOR_SIZE, Sector, SectorRange, Sectors};
use vm_memory::VolatileSlice;

/// Bytes of an uncompressed layer that are read at a time.
const PLAIN_CHUNK: usize = 256 * 1024;

/// Blocking reader with its buffers and decoders. Each thread has its own.
#[derive(Default)]
pub struct Reader {
    unpacker: Unpacker,
    buffer: Vec<u8>,
}

impl Reader {
    /// Creates a reader with empty buffers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Fills `into`, a whole number of sectors, with the content of the disk from `start` on.
    ///
    /// # Errors
    /// [`Error::Beyond`] for a range past the end of the disk, [`Error::Source`] if bytes cannot be read,
    /// [`Error::Block`] if a block is damaged.
    pub fn read_scatter(
        &mut self,
        disk: SizedImage<'_>,
        start: Sector,
        into: &Scatter<'_>,
    ) -> Result<(), Error> {
        let beyond = || Error::Beyond {
            start,
            len: into.len(),
            sectors: disk.sectors(),
        };
        let len = into.len() as u64;
        let range = SectorRange::checked(start, Sectors::whole_in(len)).ok_or_else(beyond)?;
        if range.end().saturating_since(Sector(0)) > disk.sectors()
            || !len.is_multiple_of(SECTOR_SIZE)
        {
            return Err(beyond());
        }
        let image = disk.image();
        let mut cursor = into.cursor(0);
        for piece in disk.pieces(range) {
            match piece {
                Piece::Zero { len } => cursor.zero(len as usize),
                Piece::Plain { layer, .. } => {
                    self.fill(image.container(layer), piece, &mut cursor)?
                }
                Piece::Compressed(run) => {
                    self.fill(image.container(run.layer), piece, &mut cursor)?;
                }
            }
        }
        image.check_tables()
    }

    /// As [`Reader::read_scatter`], into one buffer.
    ///
    /// # Errors
    /// Those of [`Reader::read_scatter`].
    pub fn read(
        &mut self,
        disk: SizedImage<'_>,
        start: Sector,
        into: &mut [u8],
    ) -> Result<(), Error> {
        let mut scatter = Scatter::new();
        scatter.push(VolatileSlice::from(into));
        self.read_scatter(disk, start, &scatter)
    }

    /// Fills `into` with the bytes of a layer from `offset` on, counted inside its wrappers.
    ///
    /// # Errors
    /// [`Error::TooShort`] if the layer ends before, [`Error::Source`] if bytes cannot be read,
    /// [`Error::Block`] if a block is damaged.
    pub fn read_layer(
        &mut self,
        container: &Container,
        offset: u64,
        into: &mut [u8],
    ) -> Result<(), Error> {
        let len = into.len() as u64;
        let end = offset
            .checked_add(len)
            .filter(|end| *end <= container.len());
        let Some(end) = end else {
            let (layer, found) = (container.blob().layer().clone(), container.len());
            return Err(Error::TooShort { layer, found });
        };
        let mut scatter = Scatter::new();
        scatter.push(VolatileSlice::from(into));
        let mut cursor = scatter.cursor(0);
        let mut at = offset;
        while at < end {
            let piece = container.piece(0, at, end.saturating_sub(at));
            self.fill(container, piece, &mut cursor)?;
            at = at.saturating_add(piece.len());
        }
        Ok(())
    }

    /// Reads the bytes of one piece of `container`.
    fn fill(
        &mut self,
        container: &Container,
        piece: Piece,
        into: &mut Cursor<'_, '_>,
    ) -> Result<(), Error> {
        match piece {
            Piece::Zero { len } => into.zero(len as usize),
            Piece::Plain { offset, len, .. } => self.fill_plain(container, offset, len, into)?,
            Piece::Compressed(run) => self.fill_compressed(container, &run, into)?,
        }
        Ok(())
    }

    /// Copies `len` bytes of a file from `offset` on.
    fn fill_plain(
        &mut self,
        container: &Container,
        offset: u64,
        len: u64,
        into: &mut Cursor<'_, '_>,
    ) -> Result<(), Error> {
        for at in (0..len).step_by(PLAIN_CHUNK) {
            let part = len.saturating_sub(at).min(PLAIN_CHUNK as u64);
            self.buffer.resize(part as usize, 0);
            let offset = offset.saturating_add(at);
            container.blob().read_exact_at(&mut self.buffer, offset)?;
            into.write(&self.buffer);
        }
        Ok(())
    }

    /// Reads and decodes compressed blocks.
    fn fill_compressed(
        &mut self,
        container: &Container,
        run: &CompressedRun,
        into: &mut Cursor<'_, '_>,
    ) -> Result<(), Error> {
        let Self { unpacker, buffer } = self;
        if unpacker.unpack_held(container, run, into) {
            return Ok(());
        }
        buffer.resize(run.stored as usize, 0);
        let start = *into;
        container.blob().read_decoded(buffer, run.offset, |stored| {
            *into = start;
            unpacker.unpack(container, run, stored, into)
        })
    }
}
