//! `ovbd export`: writes the merged disk of layers as a raw image.
//!
//! Threads read only the ranges that have data; other ranges become holes.

use std::fs::File;
use std::io::{self, Write};
use std::mem;
use std::num::NonZero;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::thread;

use indicatif::ProgressBar;

use super::Error;
use super::in_order::InOrder;
use super::layer_writer::Written;
use super::loaded_stack::LoadedStack;
use super::output::{self, Unnamed};
use super::unit::{CHUNK, UNIT, is_zero};
use crate::image::reader::Reader;
use crate::units::{SECTOR_SIZE, Sector};

/// Destination of a raw image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Standard output; zeros are written.
    Stdout,
    /// A file, with holes where the disk is zero; an existing file is replaced.
    Path(PathBuf),
}

/// Bytes of the disk.
struct Chunk {
    offset: u64,
    bytes: Vec<u8>,
}

/// Writes a disk, exactly as long as it is, and returns its sizes. The output has no name before it is published.
///
/// # Errors
/// [`Error::OutputIsInput`]; and if something cannot be read or written.
pub fn export(
    stack: &LoadedStack,
    target: &mut Target,
    threads: NonZero<usize>,
    progress: &ProgressBar,
) -> Result<Written, Error> {
    target.refuse_inputs(stack)?;
    progress.set_length(stack.size());
    let mut data_len = 0;
    thread::scope(|scope| {
        let worker = || {
            let mut reader = Reader::new();
            move |chunk| read(stack, &mut reader, chunk)
        };
        let mut jobs = InOrder::start(scope, threads, worker)?;
        let mut write = |done: Result<Chunk, Error>| {
            let chunk = done?;
            data_len += data_in(&chunk.bytes);
            target.write(&chunk)?;
            progress.set_position(chunk.offset);
            Ok::<_, Error>(chunk.bytes)
        };
        let (mut at, mut spare) = (0, Vec::new());
        while let Some(data) = stack.data_from(at, stack.size()) {
            let offset = data / UNIT as u64 * UNIT as u64;
            at = stack.size().min(offset + CHUNK as u64);
            let mut bytes = mem::take(&mut spare);
            bytes.resize((at - offset) as usize, 0);
            if let Some(done) = jobs.push(Chunk { offset, bytes })? {
                spare = write(done)?;
            }
        }
        while let Some(done) = jobs.pop()? {
            write(done)?;
        }
        Ok::<_, Error>(())
    })?;
    target.finish(stack.size())?;
    Ok(Written {
        file_len: stack.size(),
        data_len,
        mappings: 0,
    })
}

/// Bytes of the units that are not zero.
fn data_in(bytes: &[u8]) -> u64 {
    let data = bytes.chunks(UNIT).filter(|unit| !is_zero(unit));
    data.map(|unit| unit.len() as u64).sum()
}

/// Fills a chunk with the content of the disk.
fn read(stack: &LoadedStack, reader: &mut Reader, mut chunk: Chunk) -> Result<Chunk, Error> {
    let len = chunk.bytes.len();
    let sector = SECTOR_SIZE as usize;
    chunk.bytes.resize(len.next_multiple_of(sector), 0);
    stack.read(reader, Sector::containing(chunk.offset), &mut chunk.bytes)?;
    chunk.bytes.truncate(len);
    Ok(chunk)
}

/// An open output.
#[derive(Debug)]
pub struct Target(Kind);

#[derive(Debug)]
enum Kind {
    File(Unnamed),
    Stdout {
        file: File,
        /// Bytes written so far.
        written: u64,
    },
}

impl Target {
    /// Opens standard output, or creates a file without a name.
    ///
    /// # Errors
    /// Those of [`Unnamed::create`]; [`Error::Stdout`] if standard output is closed.
    pub fn open(to: &Output) -> Result<Self, Error> {
        let Output::Path(path) = to else {
            // Without the line buffer of the standard library.
            let file = io::stdout().as_fd().try_clone_to_owned();
            let file = file.map_err(Error::Stdout)?.into();
            return Ok(Self(Kind::Stdout { file, written: 0 }));
        };
        Ok(Self(Kind::File(Unnamed::create(path)?)))
    }

    fn refuse_inputs(&self, stack: &LoadedStack) -> Result<(), Error> {
        match &self.0 {
            Kind::File(file) => output::refuse_inputs(file.content().target(), stack.inputs()),
            Kind::Stdout { .. } => Ok(()),
        }
    }

    /// Writes a chunk, which lies behind the earlier ones.
    fn write(&mut self, chunk: &Chunk) -> Result<(), Error> {
        match &mut self.0 {
            Kind::Stdout { file, written } => {
                let result = write_zeros(file, chunk.offset - *written);
                let result = result.and_then(|()| file.write_all(&chunk.bytes));
                *written = chunk.offset + chunk.bytes.len() as u64;
                result.map_err(Error::Stdout)
            }
            Kind::File(file) => {
                let mut file = file.content();
                let units: Vec<_> = chunk.bytes.chunks(UNIT).collect();
                let mut at = chunk.offset;
                for run in units.chunk_by(|one, next| is_zero(one) == is_zero(next)) {
                    let len = run.iter().map(|unit| unit.len()).sum::<usize>();
                    if !is_zero(run[0]) {
                        let start = (at - chunk.offset) as usize;
                        file.write_at(&chunk.bytes[start..start + len], at)?;
                    }
                    at += len as u64;
                }
                Ok(())
            }
        }
    }

    /// Adds the zeros at the end of a disk of `size` bytes.
    fn finish(&mut self, size: u64) -> Result<(), Error> {
        match &mut self.0 {
            Kind::Stdout { file, written } => {
                write_zeros(file, size - *written).map_err(Error::Stdout)
            }
            Kind::File(file) => file.content().set_len(size),
        }
    }

    /// Makes a file durable and gives it its name.
    ///
    /// # Errors
    /// Those of [`Unnamed::publish`].
    pub fn publish(self) -> Result<(), Error> {
        match self.0 {
            Kind::Stdout { .. } => Ok(()),
            Kind::File(file) => file.publish(),
        }
    }
}

fn write_zeros(file: &mut File, mut len: u64) -> io::Result<()> {
    let zeros = vec![0; CHUNK];
    while len > 0 {
        let part = len.min(CHUNK as u64);
        file.write_all(&zeros[..part as usize])?;
        len -= part;
    }
    Ok(())
}
