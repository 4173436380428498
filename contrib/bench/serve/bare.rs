//! The bare loops: what decoding, or copying, the same blocks takes with nothing around it.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use common::content::Random;
use ovbd_vhost::codec::Decoder;
use ovbd_vhost::format::zfile::Algorithm;
use ovbd_vhost::image::Image;
use ovbd_vhost::image::config::Stack;
use ovbd_vhost::image::pieces::Piece;
use ovbd_vhost::units::SectorRange;
use vm_memory::VolatileSlice;

use crate::Result;
use crate::content::{BLOCK, Content, WINDOW};
use crate::drive::Outcome;

/// Blocks in a loop: with what they decode from, more than the processor's caches hold.
const BLOCKS: usize = 60_000;

/// Bytes of checksum after a stored block.
const CHECKSUM: u32 = 4;

/// Stored blocks in private memory, in the order they are decoded in.
pub struct Bare {
    /// None: blocks as they are.
    algorithm: Option<Algorithm>,
    stored: Vec<u8>,
    /// Where each block lies in `stored`.
    places: Vec<(usize, usize)>,
    random: bool,
}

impl Bare {
    /// Takes blocks of the one-layer image at `path`, at random or in order, and checks each.
    pub fn load(path: &Path, content: &Content, random: bool) -> Result<Self> {
        let image = Image::open(&Stack::new([path]))?;
        let zfile_map = image.container(0).zfile_map();
        let mut bare = Self {
            algorithm: zfile_map.map(|zfile_map| zfile_map.header().format.algorithm),
            stored: Vec::new(),
            places: Vec::new(),
            random,
        };
        let all = content.blocks();
        let mut numbers = Random::new(1);
        let mut target = vec![0; BLOCK];
        for number in 0..BLOCKS.min(all.len()) {
            let at = if random {
                numbers.below(all.len() as u64) as usize
            } else {
                number
            };
            let start = u64::from(all[at]) * BLOCK as u64;
            let range = SectorRange::of_bytes(&(start..start + BLOCK as u64));
            let (offset, len) = match image.at_own_size().pieces(range).next() {
                Some(Piece::Compressed(piece)) if piece.count == 1 && piece.len == BLOCK as u64 => {
                    (piece.offset, piece.stored - CHECKSUM)
                }
                Some(Piece::Plain { offset, len, .. }) if len == BLOCK as u64 => {
                    (offset, BLOCK as u32)
                }
                other => return Err(format!("block {} is cut: {other:?}", all[at]).into()),
            };
            let start = bare.stored.len();
            bare.stored.resize(start + len as usize, 0);
            image
                .container(0)
                .blob()
                .read_exact_at(&mut bare.stored[start..], offset)?;
            bare.places.push((start, len as usize));
            let target = VolatileSlice::from(target.as_mut_slice());
            bare.decode(&mut Decoder::default(), number, &target)?;
            if content.wrong(all[at], &target).is_some() {
                return Err(format!("block {} is not what the raw image holds", all[at]).into());
            }
        }
        if random {
            // Not in the order in which they lie in memory, which the processor would foresee.
            numbers.shuffle(&mut bare.places);
        }
        Ok(bare)
    }

    fn decode(&self, decoder: &mut Decoder, number: usize, into: &VolatileSlice) -> Result<()> {
        let (start, len) = self.places[number];
        let stored = &self.stored[start..start + len];
        match self.algorithm {
            Some(algorithm) => decoder.decode(algorithm, stored, into)?,
            None => into.copy_from(stored),
        }
        Ok(())
    }

    /// Decodes for so long. Gives what was decoded, counted in reads as a guest makes them, and the
    /// nanoseconds this thread ran.
    pub fn measure(&self, time: Duration) -> Result<(Outcome, u64)> {
        // As much memory as the requests in flight have.
        let mut memory = vec![0; if self.random { 32 * BLOCK } else { 8 * WINDOW }];
        let target = VolatileSlice::from(memory.as_mut_slice());
        let mut decoder = Decoder::default();
        let mut blocks = 0;
        let ran = ran()?;
        let start = Instant::now();
        while start.elapsed() < time {
            for _ in 0..32 {
                let into = target.subslice(blocks * BLOCK % target.len(), BLOCK)?;
                self.decode(&mut decoder, blocks % self.places.len(), &into)?;
                blocks += 1;
            }
        }
        let outcome = Outcome {
            reads: if self.random {
                blocks
            } else {
                blocks * BLOCK / WINDOW
            } as u64,
            seconds: start.elapsed().as_secs_f64(),
            ..Outcome::default()
        };
        Ok((outcome, ran_since(ran)?))
    }
}

/// Nanoseconds this thread has run.
pub fn ran() -> Result<u64> {
    // The kernel brings the count up to date when a thread gives way.
    thread::yield_now();
    let text = fs::read_to_string("/proc/thread-self/schedstat")?;
    Ok(text.split(' ').next().unwrap_or_default().parse()?)
}

/// Nanoseconds this thread has run since it had run `before`.
pub fn ran_since(before: u64) -> Result<u64> {
    Ok(ran()? - before)
}
