//! Writes a ZFile: bytes are cut into blocks in order, compressed on all threads, and written in
//! order.
//!
//! The first block can be kept back until the end, for a writer that does not know its content
//! before. Space for the longest possible block is reserved, and the bytes behind it move down at
//! the end, so that the file is the same.

use std::mem;
use std::num::NonZero;
use std::thread::Scope;

use super::Error;
use super::chunks::{Chunk, ChunkPipeline};
use super::output::NewFile;
use crate::codec::Encoder;
use crate::format::crc;
use crate::format::zfile::{
    BlockFormat, CHECKSUM_LEN, HEADER_LEN, Totals, encode_table, final_header, initial_header,
    trailer,
};

/// Longest stored block, checksum included, that the upstream reader reads completely.
const MAX_STORED_BLOCK: usize = 65535;

/// Entries of the block table in memory; older ones go to a file without a name.
const TABLE_IN_MEMORY: usize = 4 * 1024 * 1024;

/// A ZFile in progress.
pub struct ZFileWriter {
    format: BlockFormat,
    /// Byte of the output at which the ZFile starts.
    start: u64,
    /// The first block, if it is kept back.
    head: Option<Vec<u8>>,
    chunks: ChunkPipeline,
    table: Table,
    original_size: u64,
}

impl ZFileWriter {
    /// Starts a ZFile at the current position of `file`, and its threads, each with its own `fetch`
    /// as in [`ChunkPipeline::start`]. With `keep_head`, the first block is kept back.
    ///
    /// # Errors
    /// The header cannot be written, or no thread can be started.
    pub fn start<'scope, F>(
        scope: &'scope Scope<'scope, '_>,
        threads: NonZero<usize>,
        fetch: impl Fn() -> F,
        file: &mut NewFile,
        format: BlockFormat,
        keep_head: bool,
    ) -> Result<Self, Error>
    where
        F: FnMut(u64, &mut [u8]) -> Result<(), Error> + Send + 'scope,
    {
        let start = file.position();
        file.write(&initial_header(&format))?;
        if keep_head {
            // Longest possible stored block.
            file.skip(MAX_STORED_BLOCK as u64)?;
        }
        let pack = || {
            let mut encoder = Encoder::new();
            move |chunk: &mut Chunk| compress(&mut encoder, &format, chunk)
        };
        Ok(Self {
            format,
            start,
            head: keep_head.then(Vec::new),
            chunks: ChunkPipeline::start(scope, threads, fetch, pack)?,
            table: Table::new(TABLE_IN_MEMORY),
            original_size: 0,
        })
    }

    /// Adds bytes.
    ///
    /// # Errors
    /// A block cannot be compressed or written.
    pub fn write(&mut self, file: &mut NewFile, mut bytes: &[u8]) -> Result<(), Error> {
        self.original_size += bytes.len() as u64;
        if let Some(head) = &mut self.head {
            let part = bytes
                .len()
                .min(self.format.block_size as usize - head.len());
            let (first, rest) = bytes.split_at(part);
            head.extend_from_slice(first);
            bytes = rest;
        }
        let Self {
            chunks,
            table,
            head,
            ..
        } = self;
        chunks.write(bytes, |chunk| take(file, table, head.is_some(), chunk))
    }

    /// Adds `len` bytes, which `fetch` reads at `from`. Not with `keep_head`.
    ///
    /// # Errors
    /// Those of [`ZFileWriter::write`]; the bytes cannot be fetched.
    pub fn fetch(&mut self, file: &mut NewFile, len: u64, from: u64) -> Result<(), Error> {
        self.original_size += len;
        let Self { chunks, table, .. } = self;
        chunks.fetch(len, from, |chunk| take(file, table, false, chunk))
    }

    /// Writes the remaining blocks, the table and the trailer. `head` replaces the first bytes of a
    /// block that was kept back.
    ///
    /// # Errors
    /// A block cannot be compressed, or the file cannot be written.
    pub fn finish(mut self, file: &mut NewFile, head: Option<&[u8]>) -> Result<(), Error> {
        let Self {
            chunks,
            table,
            head: kept,
            ..
        } = &mut self;
        chunks.finish(|chunk| take(file, table, kept.is_some(), chunk))?;
        let first = self.write_head(file, head)?;
        let table_at = file.position();
        let table_crc = self.table.write(file, first)?;
        let totals = Totals {
            table_offset: table_at - self.start,
            blocks: self.table.len + u64::from(first.is_some()),
            original_size: self.original_size,
            table_crc,
        };
        file.write(&trailer(&self.format, &totals))?;
        file.write_at(&final_header(&self.format, &totals), self.start)
    }

    /// Writes the block that was kept back, with `head` over its start; returns its stored length.
    fn write_head(
        &mut self,
        file: &mut NewFile,
        head: Option<&[u8]>,
    ) -> Result<Option<u32>, Error> {
        let Some(mut plain) = self.head.take() else {
            return Ok(None);
        };
        if let Some(target) = head.and_then(|head| plain.get_mut(..head.len())) {
            target.copy_from_slice(head.unwrap_or_default());
        }
        let mut chunk = Chunk::of(plain);
        compress(&mut Encoder::new(), &self.format, &mut chunk)?;
        check_stored(file, 0, chunk.stored.len())?;
        let at = self.start + HEADER_LEN as u64;
        file.write_at(&chunk.stored, at)?;
        file.move_down(at + MAX_STORED_BLOCK as u64, at + chunk.stored.len() as u64)?;
        Ok(chunk.lens.first().copied())
    }
}

/// Refuses a block that the upstream reader cannot read.
fn check_stored(file: &NewFile, block: u64, stored: usize) -> Result<(), Error> {
    if stored <= MAX_STORED_BLOCK {
        return Ok(());
    }
    let path = file.target().to_owned();
    Err(Error::BlockTooLong {
        path,
        block,
        stored,
    })
}

/// Compresses the blocks of a chunk.
fn compress(encoder: &mut Encoder, format: &BlockFormat, chunk: &mut Chunk) -> Result<(), Error> {
    let (mut stored, mut lens) = (mem::take(&mut chunk.stored), mem::take(&mut chunk.lens));
    for plain in chunk.bytes().chunks(format.block_size as usize) {
        let start = stored.len();
        encoder.encode(format.algorithm, plain, &mut stored)?;
        if format.checksum {
            let checksum = crc::raw(crc::BLOCK_SEED, &stored[start..]);
            let bytes: [u8; CHECKSUM_LEN] = checksum.to_le_bytes();
            stored.extend_from_slice(&bytes);
        }
        // The stored length of 64 KiB always fits 32 bits.
        lens.push((stored.len() - start) as u32);
    }
    (chunk.stored, chunk.lens) = (stored, lens);
    Ok(())
}

/// Writes the blocks of a finished chunk.
fn take(file: &mut NewFile, table: &mut Table, head: bool, chunk: &Chunk) -> Result<(), Error> {
    for len in &chunk.lens {
        let block = u64::from(head) + table.len;
        check_stored(file, block, *len as usize)?;
        table.push(file, *len)?;
    }
    file.write(&chunk.stored)
}

/// Stored lengths of all blocks; the older ones of very many are in a file without a name.
struct Table {
    recent: Vec<u32>,
    most: usize,
    older: Option<NewFile>,
    len: u64,
}

impl Table {
    fn new(most: usize) -> Self {
        Self {
            recent: Vec::new(),
            most,
            older: None,
            len: 0,
        }
    }

    fn push(&mut self, output: &NewFile, stored: u32) -> Result<(), Error> {
        if self.recent.len() == self.most {
            let older = match &mut self.older {
                Some(older) => older,
                none => none.insert(output.scratch()),
            };
            older.write(&encode_table(&self.recent))?;
            self.recent.clear();
        }
        self.recent.push(stored);
        self.len += 1;
        Ok(())
    }

    /// Writes `first`, then all entries; returns their checksum.
    fn write(&mut self, file: &mut NewFile, first: Option<u32>) -> Result<u32, Error> {
        let mut crc = 0;
        let mut write = |bytes: &[u8]| {
            crc = crc::raw(crc, bytes);
            file.write(bytes)
        };
        write(&encode_table(first.as_slice()))?;
        if let Some(older) = &mut self.older {
            let mut chunk = vec![0; self.most * 4];
            for at in (0..older.position()).step_by(chunk.len()) {
                older.read_at(&mut chunk, at)?;
                write(&chunk)?;
            }
        }
        write(&encode_table(&self.recent))?;
        Ok(crc)
    }
}

#[cfg(test)]
mod tests {
    use super::super::output::Unnamed;
    use super::*;

    #[test]
    fn a_long_table_is_written_whole() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out");
        for len in [0, 3, 4, 5, 12, 13] {
            let unnamed = Unnamed::create(&target).unwrap();
            let mut file = unnamed.content();
            let mut table = Table::new(4);
            for stored in 0..len {
                table.push(&file, stored).unwrap();
            }
            assert_eq!(table.len, u64::from(len));
            let crc = table.write(&mut file, Some(99)).unwrap();
            file.finish().unwrap();
            unnamed.publish().unwrap();
            let entries: Vec<u32> = std::iter::once(99).chain(0..len).collect();
            let expected = encode_table(&entries);
            assert_eq!(std::fs::read(&target).unwrap(), expected);
            assert_eq!(crc, crc::raw(0, &expected));
        }
        assert_eq!(dir.path().read_dir().unwrap().count(), 1);
    }
}
