//! A disk without a daemon: opens its files, and reads and writes it with calls that wait for storage.

use std::sync::Arc;

use ovbd_vhost::image::OpenStack;
use ovbd_vhost::image::config::Stack;
use ovbd_vhost::image::reader::Reader;
use ovbd_vhost::io::scatter::Cursor;
use ovbd_vhost::units::{Sector, SectorRange, Sectors};
use ovbd_vhost::writable::{
    Error, FlushRetries, Lookup, Options, Paths, Snapshots, SpanContent, Volume,
};

/// Opens the files of `stack`, which may be empty, and loads the disk above it, whose first writable pair is `first`.
///
/// # Errors
/// Those of [`Stack::open_files`] and [`Snapshots::load`].
pub fn open(
    stack: &Stack,
    first: &Paths,
    options: Options,
) -> Result<(Arc<Volume>, Snapshots), Error> {
    let files = match stack.layers() {
        [] => OpenStack::empty(stack.lineage()),
        _ => stack.open_files()?,
    };
    Snapshots::load(stack, files, first, options)
}

/// Reads and writes that wait for storage.
pub trait BlockingIo {
    /// Fills `into` with the bytes of the disk from sector `start` on.
    ///
    /// # Errors
    /// The bytes cannot be read or decoded.
    fn read(&self, reader: &mut Reader, start: Sector, into: &mut [u8]) -> Result<(), Error>;

    /// Writes the next bytes of `data` to the sectors of `range`.
    ///
    /// # Errors
    /// Those of [`Volume::write_now`] and [`Volume::flush`].
    fn write(&self, range: SectorRange, data: Cursor<'_, '_>) -> Result<(), Error>;
}

impl BlockingIo for Volume {
    fn read(&self, reader: &mut Reader, start: Sector, into: &mut [u8]) -> Result<(), Error> {
        let mut lookup = Lookup::default();
        let (mut at, mut rest) = (start, into);
        while !rest.is_empty() {
            let sectors = Sectors::whole_in(rest.len() as u64);
            self.lookup(SectorRange::new(at, at + sectors), &mut lookup);
            if lookup.is_empty() {
                return Ok(reader.read(self.lower(), at, rest)?);
            }
            for span in lookup.spans() {
                let (part, later) = rest.split_at_mut(span.sectors.bytes() as usize);
                match span.content {
                    SpanContent::Lower => reader.read(self.lower(), at, part)?,
                    SpanContent::Zero => part.fill(0),
                    SpanContent::Data { file, offset } => {
                        lookup.file(file).read_exact_at(part, offset)?;
                    }
                }
                (at, rest) = (at + span.sectors, later);
            }
        }
        Ok(())
    }

    fn write(&self, range: SectorRange, data: Cursor<'_, '_>) -> Result<(), Error> {
        let mut retries = FlushRetries::default();
        loop {
            match self.write_now(range, data) {
                Err(error) if retries.allow(&error) => self.flush()?,
                done => return done,
            }
        }
    }
}
