//! What the disk holds: which blocks have data, and what a read must bring.
//!
//! The timed part checks one word of each block it reads against a table of such words; the pass
//! before it compares everything with the raw image.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use vm_memory::{Bytes, VolatileSlice};

/// Bytes of a block: the unit of reads and of checks.
pub const BLOCK: usize = 4096;

/// Bytes of a sequential read, and blocks in it.
pub const WINDOW: usize = 128 << 10;
const WINDOW_BLOCKS: usize = WINDOW / BLOCK;

/// A raw image, known block by block.
pub struct Content {
    raw: File,
    /// One word of each block, at [`probe`].
    words: Vec<u64>,
    /// Blocks that are not all zeros.
    blocks: Vec<u32>,
    /// First blocks of the windows in which no block is all zeros.
    windows: Vec<u32>,
}

impl Content {
    /// Reads the raw image at `path`, whole windows long.
    pub fn read(path: &Path) -> io::Result<Self> {
        let raw = File::open(path)?;
        let windows = raw.metadata()?.len() / WINDOW as u64;
        let mut content = Self {
            raw,
            words: Vec::new(),
            blocks: Vec::new(),
            windows: Vec::new(),
        };
        let mut bytes = vec![0; WINDOW];
        for window in 0..windows {
            content
                .raw
                .read_exact_at(&mut bytes, window * WINDOW as u64)?;
            let first = content.words.len() as u32;
            let before = content.blocks.len();
            for (number, block) in (first..).zip(bytes.chunks(BLOCK)) {
                let (words, _) = block.as_chunks::<8>();
                content
                    .words
                    .push(u64::from_le_bytes(words[probe(number) / 8]));
                if words.iter().any(|word| *word != [0; 8]) {
                    content.blocks.push(number);
                }
            }
            if content.blocks.len() == before + WINDOW_BLOCKS {
                content.windows.push(first);
            }
        }
        Ok(content)
    }

    /// Blocks with data.
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// First blocks of windows full of data.
    pub fn windows(&self) -> &[u32] {
        &self.windows
    }

    /// Number of blocks of the disk.
    pub fn len(&self) -> u32 {
        self.words.len() as u32
    }

    /// The first block of what was read from block `first` on that is not what the disk holds, by
    /// one word of each.
    pub fn wrong(&self, first: u32, data: &VolatileSlice) -> Option<u32> {
        let numbers = first..first + (data.len() / BLOCK) as u32;
        numbers.zip(0..).find_map(|(number, at)| {
            let word: u64 = data.read_obj(at * BLOCK + probe(number)).ok()?;
            (u64::from_le(word) != self.words[number as usize]).then_some(number)
        })
    }

    /// As [`Content::wrong`], by all bytes.
    pub fn wrong_anywhere(&self, first: u32, data: &VolatileSlice) -> io::Result<Option<u32>> {
        let mut expected = vec![0; data.len()];
        let mut found = vec![0; data.len()];
        self.raw
            .read_exact_at(&mut expected, u64::from(first) * BLOCK as u64)?;
        data.copy_to(&mut found);
        let mut pairs = (first..).zip(expected.chunks(BLOCK).zip(found.chunks(BLOCK)));
        Ok(pairs.find_map(|(number, (expected, found))| (expected != found).then_some(number)))
    }
}

/// Which byte of a block its word starts at.
fn probe(block: u32) -> usize {
    (block.wrapping_mul(0x9e37_79b1) >> 20) as usize & (BLOCK - 8) & !7
}
