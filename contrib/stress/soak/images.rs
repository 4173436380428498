//! The images that are served: disks of random content, in layers of several forms.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ovbd_vhost::format::zfile::Algorithm;

use common::blk::SECTOR;
use common::content::Random;
use common::layers::{LayerBuilder, Pack, noise, wrap_tar, zfile};

/// Sectors of each disk.
const SECTORS: u64 = 64 << 10;

/// How the layers of an image lie in their files.
#[derive(Clone, Copy, Debug)]
pub enum Form {
    /// LZ4 with checksums.
    Lz4,
    /// zstd with checksums, in larger blocks and tar files.
    Zstd,
    /// Not compressed.
    Plain,
    /// One like this, the next like that.
    Mixed,
}

/// A stack of layers, and what must be read from it.
pub struct Image {
    /// Every byte of the disk.
    pub content: Arc<Vec<u8>>,
    /// The layers, bottom first.
    pub files: Vec<PathBuf>,
    /// The bytes of each.
    stored: Vec<Vec<u8>>,
}

impl Image {
    /// Writes an image of so many layers into `folder`, which is made.
    pub fn write(folder: &Path, layers: u64, form: Form, random: &mut Random) -> Self {
        fs::create_dir(folder).expect("folder for an image");
        let mut content = vec![0; (SECTORS * SECTOR) as usize];
        let stored = (0..layers).map(|number| {
            let layer = layer(&mut content, number, layers, random);
            match form {
                Form::Plain => layer,
                Form::Lz4 => zfile(&layer, Pack::default()),
                Form::Zstd => zstd(&layer),
                Form::Mixed if number % 3 == 0 => zstd(&layer),
                Form::Mixed if number % 3 == 1 => zfile(&layer, Pack::default()),
                Form::Mixed => layer,
            }
        });
        let stored: Vec<_> = stored.collect();
        let write = |(number, bytes): (usize, &Vec<u8>)| {
            let path = folder.join(format!("{number}.obd"));
            fs::write(&path, bytes).expect("layer");
            path
        };
        Self {
            files: stored.iter().enumerate().map(write).collect(),
            content: Arc::new(content),
            stored,
        }
    }

    /// Cuts a random layer somewhere, until the result is dropped.
    pub fn cut(&self, random: &mut Random) -> Cut<'_> {
        let layer = random.below(self.files.len() as u64) as usize;
        let content = &self.stored[layer];
        let file = File::options().write(true).open(&self.files[layer]);
        let cut = Cut {
            file: file.expect("layer"),
            end: random.below(content.len() as u64),
            content,
        };
        cut.file.set_len(cut.end).expect("cut");
        cut
    }
}

/// A layer cut short; whole again when dropped.
pub struct Cut<'i> {
    file: File,
    end: u64,
    content: &'i [u8],
}

impl Drop for Cut<'_> {
    fn drop(&mut self) {
        let missing = &self.content[self.end as usize..];
        self.file.write_all_at(missing, self.end).expect("layer");
    }
}

fn zstd(layer: &[u8]) -> Vec<u8> {
    let pack = Pack {
        algorithm: Algorithm::Zstd,
        block_size: 16384,
        ..Pack::default()
    };
    wrap_tar(&zfile(layer, pack))
}

/// Layer `number` of `layers`, and its effect on `content`: the bottom one covers most of the disk,
/// the others pieces of it.
fn layer(content: &mut [u8], number: u64, layers: u64, random: &mut Random) -> Vec<u8> {
    let mut builder = LayerBuilder::new(SECTORS * SECTOR);
    let bottom = number == 0;
    let (gap, length) = match bottom {
        true => (300, 3000),
        // All others together cover about half of it.
        false => (40 * layers, 40),
    };
    let mut at = random.below(gap);
    while at < SECTORS {
        let end = (at + random.within(1..=length)).min(SECTORS);
        let range = (at * SECTOR) as usize..(end * SECTOR) as usize;
        if !bottom && random.below(4) == 0 {
            content[range].fill(0);
            builder = builder.zeroed(at, end - at);
        } else {
            let data = noise(random.any(), range.len());
            builder = builder.data(at, &data);
            content[range].copy_from_slice(&data);
        }
        at = end + random.within(1..=gap);
    }
    builder.lsmt()
}
