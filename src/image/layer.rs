//! One layer: its container, what its trailer says, and its mappings.

use std::path::Path;

use uuid::Uuid;

use super::container::Container;
use super::error::Error;
use super::probe::{last_trailer, layer_trailer};
use super::reader::Reader;
use super::wait_for_seal;
use crate::format::crc;
use crate::format::lsmt::{self, ENTRY_LEN, HEADER_LEN, Header, IndexReader, Mapping, Part};
use crate::source::{Blob, LayerRef};

/// Bytes of an index read at a time.
const INDEX_CHUNK: u64 = 1024 * 1024;

/// A sealed layer, open.
#[derive(Debug)]
pub struct Layer {
    container: Container,
    trailer: Header,
    mappings: usize,
    index_crc: u32,
}

impl Layer {
    /// Opens a file and loads the layer it holds.
    ///
    /// # Errors
    /// [`Error::Source`] if the file cannot be opened, and those of [`Layer::load`].
    pub fn open(path: &Path) -> Result<(Self, Vec<Mapping>), Error> {
        Self::load(Blob::open(path)?)
    }

    /// Loads a layer in any of its wrappers, and reads its index. Waits for a layer that is being
    /// sealed. Opens no file.
    ///
    /// # Errors
    /// [`Error::Source`] if the blob cannot be read, [`Error::Unsealed`] and [`Error::InUse`] for a
    /// writable layer; the others name the rule of the formats that the blob breaks.
    pub fn load(blob: Blob) -> Result<(Self, Vec<Mapping>), Error> {
        let Some(uuid) = wait_for_seal::wait(&blob)? else {
            return Self::within(Container::load(blob)?, None);
        };
        let container = Container::load(blob.measured()?)?;
        let (layer, mappings) =
            Self::within(container, Some(uuid)).map_err(|error| match error {
                Error::TooShort { layer, .. } => Error::Unsealed { layer },
                Error::Lsmt {
                    layer,
                    source: lsmt::Error::Magic(Part::Trailer),
                    ..
                } => Error::Unsealed { layer },
                error => error,
            })?;
        layer.container.blob().unlock()?;
        Ok((layer, mappings))
    }

    /// Reads what a container holds: a layer with this uuid, if it began as a writable one.
    fn within(container: Container, began: Option<Uuid>) -> Result<(Self, Vec<Mapping>), Error> {
        let named = container.blob().layer().clone();
        // Sealing in place ends the file at the trailer.
        let trailer_at = match began {
            None => layer_trailer(&container)?,
            Some(_) => last_trailer(&container)?,
        };
        let failed = |offset| {
            let named = &named;
            move |source| Error::Lsmt {
                layer: named.clone(),
                offset,
                source,
            }
        };

        let mut reader = Reader::new();
        let mut bytes = [0; HEADER_LEN];
        reader.read_layer(&container, 0, &mut bytes)?;
        Header::decode(&bytes, Part::Header).map_err(failed(0))?;
        reader.read_layer(&container, trailer_at, &mut bytes)?;
        // The trailer counts: sealing in place leaves the header as it was.
        let trailer = Header::decode(&bytes, Part::Trailer).map_err(failed(trailer_at))?;
        if began.is_some_and(|uuid| !uuid.is_nil() && uuid != trailer.uuid) {
            // Guest data that looks like a trailer.
            return Err(Error::Unsealed { layer: named });
        }

        let index_at = trailer.index_offset;
        let index = IndexReader::new(&trailer, trailer_at).map_err(failed(trailer_at))?;
        let (mappings, index_crc) =
            read_index(&container, &trailer, index, &mut reader, &failed(index_at))?;
        let layer = Self {
            container,
            trailer,
            mappings: mappings.len(),
            index_crc,
        };
        Ok((layer, mappings))
    }

    /// The file and its wrappers.
    pub fn container(&self) -> &Container {
        &self.container
    }

    /// What the layer was named by.
    pub fn layer_ref(&self) -> &LayerRef {
        self.container.blob().layer()
    }

    /// What the layer says about itself.
    pub fn trailer(&self) -> &Header {
        &self.trailer
    }

    /// Name of the layer; nil if it has none.
    pub fn uuid(&self) -> Uuid {
        self.trailer.uuid
    }

    /// Name of the layer it was made upon; nil if it has none.
    pub fn parent_uuid(&self) -> Uuid {
        self.trailer.parent_uuid
    }

    /// Number of mappings, without padding.
    pub fn mappings(&self) -> usize {
        self.mappings
    }

    /// Checksum of the index as it lies in the layer.
    pub fn index_crc(&self) -> u32 {
        self.index_crc
    }
}

/// Reads the whole index: the mappings, and the checksum of their bytes.
fn read_index(
    container: &Container,
    trailer: &Header,
    mut index: IndexReader,
    reader: &mut Reader,
    failed: &dyn Fn(lsmt::Error) -> Error,
) -> Result<(Vec<Mapping>, u32), Error> {
    let mut mappings = Vec::new();
    let mut crc = 0;
    let mut at = trailer.index_offset;
    // Both fit: the index was found to lie before the trailer.
    let end = at + trailer.index_entries * ENTRY_LEN as u64;
    let mut chunk = vec![0; (end - at).min(INDEX_CHUNK) as usize];
    while at < end {
        let len = (end - at).min(INDEX_CHUNK);
        let chunk = &mut chunk[..len as usize];
        reader.read_layer(container, at, chunk)?;
        crc = crc::raw(crc, chunk);
        index.read(chunk, &mut mappings).map_err(failed)?;
        at += len;
    }
    Ok((mappings, crc))
}
