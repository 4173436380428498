//! Cuts the bytes of a layer into chunks, which all threads compress.
//!
//! Bytes in memory are copied into a chunk. Bytes in files are only noted there; the thread that
//! compresses the chunk fetches them, so that reading overlaps with compression.

use std::mem;
use std::num::NonZero;
use std::thread::Scope;

use super::Error;
use super::in_order::InOrder;

/// Bytes of a chunk, a multiple of each block size; the last chunk may be shorter.
const CHUNK_LEN: usize = 256 * 1024;

/// A piece of the layer, before and after compression.
#[derive(Default)]
pub struct Chunk {
    /// Buffer of the bytes. It is never shortened, because clearing it would take time. If all
    /// bytes of a chunk are fetched, the thread that compresses it allocates the buffer.
    room: Vec<u8>,
    len: usize,
    fetches: Vec<Fetch>,
    /// The bytes as stored, if compressed.
    pub stored: Vec<u8>,
    /// Stored length of each block.
    pub lens: Vec<u32>,
}

/// A range of a chunk that its thread fetches.
struct Fetch {
    at: usize,
    len: usize,
    from: u64,
}

impl Chunk {
    /// A chunk of these bytes.
    pub fn of(bytes: Vec<u8>) -> Self {
        Self {
            len: bytes.len(),
            room: bytes,
            ..Self::default()
        }
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.room[..self.len]
    }

    /// Number of `wanted` bytes that fit.
    fn takes(&self, wanted: u64) -> usize {
        wanted.min((CHUNK_LEN - self.len) as u64) as usize
    }

    fn note(&mut self, len: usize, from: u64) {
        let at = self.len;
        self.len += len;
        match self.fetches.last_mut() {
            Some(last) if last.at + last.len == at && last.from + last.len as u64 == from => {
                last.len += len;
            }
            _ => self.fetches.push(Fetch { at, len, from }),
        }
    }

    fn clear(&mut self) {
        self.len = 0;
        self.fetches.clear();
        self.stored.clear();
        self.lens.clear();
    }
}

/// Compresses chunks on several threads; the results are taken in order.
pub struct ChunkPipeline {
    pending: Chunk,
    under_way: InOrder<Chunk, Result<Chunk, Error>>,
    /// Finished chunks, whose buffers are reused.
    spare: Vec<Chunk>,
}

impl ChunkPipeline {
    /// Starts threads. Each has its own `fetch`, which fills bytes from a place in the source, and
    /// its own `pack`, which compresses a chunk.
    ///
    /// # Errors
    /// [`Error::Threads`].
    pub fn start<'scope, F, P>(
        scope: &'scope Scope<'scope, '_>,
        threads: NonZero<usize>,
        fetch: impl Fn() -> F,
        pack: impl Fn() -> P,
    ) -> Result<Self, Error>
    where
        F: FnMut(u64, &mut [u8]) -> Result<(), Error> + Send + 'scope,
        P: FnMut(&mut Chunk) -> Result<(), Error> + Send + 'scope,
    {
        let worker = || {
            let (mut fetch, mut pack) = (fetch(), pack());
            let mut own_room = Vec::new();
            move |mut chunk: Chunk| {
                // Bytes that are used once stay in this processor's cache.
                let lent = chunk.room.is_empty();
                if lent {
                    mem::swap(&mut chunk.room, &mut own_room);
                    chunk.room.resize(CHUNK_LEN, 0);
                }
                let Chunk { room, fetches, .. } = &mut chunk;
                for Fetch { at, len, from } in fetches {
                    fetch(*from, &mut room[*at..*at + *len])?;
                }
                pack(&mut chunk)?;
                if lent && !chunk.stored.is_empty() {
                    mem::swap(&mut chunk.room, &mut own_room);
                }
                Ok(chunk)
            }
        };
        Ok(Self {
            pending: Chunk::default(),
            under_way: InOrder::start(scope, threads, worker)?,
            spare: Vec::new(),
        })
    }

    /// Adds bytes. Passes finished chunks to `done`.
    ///
    /// # Errors
    /// A thread or `done` failed.
    pub fn write(
        &mut self,
        mut bytes: &[u8],
        mut done: impl FnMut(&Chunk) -> Result<(), Error>,
    ) -> Result<(), Error> {
        while !bytes.is_empty() {
            let part = self.pending.takes(bytes.len() as u64);
            self.pending.room.resize(CHUNK_LEN, 0);
            let (now, later) = bytes.split_at(part);
            let at = self.pending.len;
            self.pending.room[at..at + part].copy_from_slice(now);
            self.pending.len += part;
            bytes = later;
            self.submit_full(&mut done)?;
        }
        Ok(())
    }

    /// Adds `len` bytes, which `fetch` reads at `from`.
    ///
    /// # Errors
    /// Those of [`ChunkPipeline::write`].
    pub fn fetch(
        &mut self,
        mut len: u64,
        mut from: u64,
        mut done: impl FnMut(&Chunk) -> Result<(), Error>,
    ) -> Result<(), Error> {
        while len > 0 {
            let part = self.pending.takes(len);
            self.pending.note(part, from);
            (len, from) = (len - part as u64, from + part as u64);
            self.submit_full(&mut done)?;
        }
        Ok(())
    }

    fn submit_full(&mut self, done: impl FnMut(&Chunk) -> Result<(), Error>) -> Result<(), Error> {
        match self.pending.len {
            CHUNK_LEN => self.submit(done),
            _ => Ok(()),
        }
    }

    fn submit(&mut self, mut done: impl FnMut(&Chunk) -> Result<(), Error>) -> Result<(), Error> {
        let next = self.spare.pop().unwrap_or_default();
        let chunk = mem::replace(&mut self.pending, next);
        if let Some(oldest) = self.under_way.push(chunk)? {
            let mut chunk = oldest?;
            done(&chunk)?;
            chunk.clear();
            self.spare.push(chunk);
        }
        Ok(())
    }

    /// Adds the last chunk, and waits for all chunks.
    ///
    /// # Errors
    /// Those of [`ChunkPipeline::write`].
    pub fn finish(
        &mut self,
        mut done: impl FnMut(&Chunk) -> Result<(), Error>,
    ) -> Result<(), Error> {
        if self.pending.len > 0 {
            self.submit(&mut done)?;
        }
        while let Some(chunk) = self.under_way.pop()? {
            done(&chunk?)?;
        }
        Ok(())
    }
}
