//! What copying blocks out of the mapped files of uncompressed layers takes, with nothing around it:
//! the bare loop of `bare.rs` copies from private memory, which is in one piece.

use std::fs::File;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use common::content::Random;
use ovbd_vhost::image::Image;
use ovbd_vhost::image::config::Stack;
use ovbd_vhost::image::pieces::Piece;
use ovbd_vhost::io::mapped_file::{Access, MappedFile};
use ovbd_vhost::units::SectorRange;
use vm_memory::VolatileSlice;

use crate::Result;
use crate::bare::{ran, ran_since};
use crate::content::{BLOCK, Content};
use crate::drive::Outcome;

/// Where blocks lie in mapped files.
pub struct Mapped {
    files: Vec<MappedFile>,
    /// The file and the byte of each block, in the order they are copied in.
    places: Vec<(u16, usize)>,
}

impl Mapped {
    /// Maps the layers of an image, finds its blocks, and checks each.
    pub fn load(layers: &[PathBuf], content: &Content) -> Result<Self> {
        let image = Image::open(&Stack::new(layers))?;
        let map = |path: &PathBuf| -> Result<MappedFile> {
            let file = File::open(path)?;
            let len = file.metadata()?.len();
            Ok(MappedFile::new(&file, 0, len, Access::Read)?)
        };
        let mut mapped = Self {
            files: layers.iter().map(map).collect::<Result<_>>()?,
            places: Vec::new(),
        };
        let mut target = vec![0; BLOCK];
        for block in content.blocks() {
            let start = u64::from(*block) * BLOCK as u64;
            let range = SectorRange::of_bytes(&(start..start + BLOCK as u64));
            match image.at_own_size().pieces(range).next() {
                Some(Piece::Plain { layer, offset, len }) if len == BLOCK as u64 => {
                    mapped.places.push((layer, usize::try_from(offset)?));
                }
                other => return Err(format!("block {block} is cut: {other:?}").into()),
            }
            let target = VolatileSlice::from(target.as_mut_slice());
            mapped.copy(mapped.places.len() - 1, &target)?;
            if content.wrong(*block, &target).is_some() {
                return Err(format!("block {block} is not what the raw image holds").into());
            }
        }
        Random::new(1).shuffle(&mut mapped.places);
        Ok(mapped)
    }

    fn copy(&self, number: usize, into: &VolatileSlice) -> Result<()> {
        let (file, offset) = self.places[number];
        let source = self.files[usize::from(file)].slice(offset, BLOCK);
        source
            .ok_or("a block is outside its file")?
            .copy_to_volatile_slice(*into);
        Ok(())
    }

    /// Copies for so long; gives what was copied, and the nanoseconds this thread ran.
    pub fn measure(&self, time: Duration, from: &mut usize) -> Result<(Outcome, u64)> {
        let mut memory = vec![0; 32 * BLOCK];
        let target = VolatileSlice::from(memory.as_mut_slice());
        let mut blocks = 0;
        let ran = ran()?;
        let start = Instant::now();
        while start.elapsed() < time {
            for _ in 0..32 {
                let into = target.subslice(blocks * BLOCK % target.len(), BLOCK)?;
                self.copy(*from % self.places.len(), &into)?;
                blocks += 1;
                *from += 1;
            }
        }
        let outcome = Outcome {
            reads: blocks as u64,
            seconds: start.elapsed().as_secs_f64(),
            ..Outcome::default()
        };
        Ok((outcome, ran_since(ran)?))
    }
}
