//! Writes the tables of an image to their file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use thiserror::Error;
use zerocopy::IntoBytes;

use super::super::Image;
use super::super::identity::LayerId;
use super::identities;
use crate::format::digest::Digest;
use crate::format::tables::{self, Checksum, Counts, Header, TablesError};
use crate::source;

/// Tables cannot be written.
#[derive(Debug, Error)]
pub enum WriteError {
    /// The file cannot be written.
    #[error("cannot write the image tables")]
    Write(#[from] io::Error),
    /// A layer cannot be examined.
    #[error(transparent)]
    Source(#[from] source::Error),
    /// The image has other layers than the stack of the file, or one of them has changed.
    #[error("a layer has changed since the image was opened")]
    Changed,
    /// The image has more items than a file can hold.
    #[error(transparent)]
    Tables(#[from] TablesError),
}

/// The tables file of a stack, empty and open for writing.
#[derive(Debug)]
pub struct TablesWriter {
    /// Locked as long as it is open: another process that finds the file does not use it.
    file: File,
    key: Digest,
}

impl TablesWriter {
    /// Takes an empty file, locked by this process, for the stack with this key.
    pub fn new(file: File, key: Digest) -> Self {
        Self { file, key }
    }

    /// Writes the tables of `image`, and waits until they are on storage. The file is valid from
    /// then on. Returns its length.
    ///
    /// # Errors
    /// A [`WriteError`]. The file is empty then, and the next process that finds it removes it.
    pub fn write(self, image: &Image) -> Result<u64, WriteError> {
        let written = self.write_all(image);
        if written.is_err() {
            // Others may need the space. The file is not valid either way, because the header is written last.
            let _ = self.file.set_len(0);
        }
        written
    }

    fn write_all(&self, image: &Image) -> Result<u64, WriteError> {
        let layers = image.layers.iter();
        let identities = identities(layers.map(|layer| layer.container().blob()))?;
        if identities.is_none_or(|layers| tables::key(&layers) != self.key) {
            return Err(WriteError::Changed);
        }
        let (nodes, values) = image.index.sections();
        let block_tables = || {
            let layers = image.layers.iter();
            let maps = layers.filter_map(|layer| layer.container().zfile_map());
            maps.map(|map| map.table().sections())
        };
        let count = |lens: &mut dyn Iterator<Item = usize>| lens.sum::<usize>() as u64;
        let counts = Counts {
            // At most `segment::MAX_LAYERS`.
            layers: image.layers.len() as u32,
            nodes: nodes.len() as u64,
            segments: image.index.len() as u64,
            bases: count(&mut block_tables().map(|(bases, _)| bases.len())),
            starts: count(&mut block_tables().map(|(_, starts)| starts.len())),
        };
        let layout = counts.layout().ok_or(TablesError::Counts(counts))?;
        let mut content = Content::new(&self.file);
        for (number, layer) in image.layers.iter().enumerate() {
            let id = image.ids.get().and_then(|ids| ids.get(number));
            let sampled = match id {
                Some(LayerId::Sampled(hash)) => Some(*hash),
                _ => None,
            };
            content.append(&layer.record(sampled).encode())?;
        }
        content.pad(layout.nodes)?;
        content.append(nodes.as_bytes())?;
        content.pad(layout.bases)?;
        for (bases, _) in block_tables() {
            content.append(bases.as_bytes())?;
        }
        content.pad(layout.starts)?;
        for (_, starts) in block_tables() {
            content.append(starts.as_bytes())?;
        }
        content.pad(layout.values)?;
        content.append(values)?;
        let header = Header {
            key: self.key,
            counts,
            content_checksum: content.checksum.value(),
        };
        // A header in front of bytes that never reached storage would be believed.
        self.file.sync_data()?;
        self.file.write_all_at(&header.encode(), 0)?;
        self.file.sync_data()?;
        Ok(layout.len)
    }
}

/// The bytes behind the header.
struct Content<'f> {
    file: &'f File,
    at: u64,
    checksum: Checksum,
}

impl<'f> Content<'f> {
    fn new(file: &'f File) -> Self {
        Self {
            file,
            at: tables::HEADER_LEN as u64,
            checksum: Checksum::default(),
        }
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, self.at)?;
        self.checksum.update(bytes);
        self.at = self.at.saturating_add(bytes.len() as u64);
        Ok(())
    }

    /// Appends zeros up to byte `at`, which is less than a section's alignment away.
    fn pad(&mut self, at: u64) -> io::Result<()> {
        let zeros = [0; tables::ALIGNMENT as usize];
        let len = at.saturating_sub(self.at) as usize;
        self.append(zeros.get(..len).unwrap_or_default())
    }
}
