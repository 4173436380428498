//! One sealed layer: its container, its trailer and its mappings.
#![cfg_attr(
    not(test),
    warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)
)]

use std::sync::Arc;

use uuid::Uuid;

use super::container::{Container, ZFileMap};
use super::error::Error;
use super::open_layers::OpenLayers;
use super::probe::{last_trailer, layer_trailer};
use super::reader::Reader;
use super::wait_for_seal;
use crate::format::crc;
use crate::format::lsmt::{self, ENTRY_LEN, HEADER_LEN, Header, HeaderKind, IndexReader, Mapping};
use crate::format::tables::LayerRecord;
use crate::format::zfile::BlockTable;
use crate::source::{Blob, BlobIdentity, LayerRef};

/// Bytes of an index read at a time.
const INDEX_CHUNK: usize = 1024 * 1024;

/// An open sealed layer of a stack. Stacks with the same layer share it, each under its own name.
#[derive(Clone, Debug)]
pub struct Layer {
    name: LayerRef,
    shared: Arc<SharedLayer>,
}

/// The open layers of this process.
static OPEN_LAYERS: OpenLayers<SharedLayer> = OpenLayers::new();

/// An open layer, shared by all stacks of this process.
#[derive(Debug)]
pub(super) struct SharedLayer {
    container: Container,
    trailer: Header,
    /// Byte of the layer at which the trailer starts.
    trailer_at: u64,
    /// Number of mappings, without padding.
    mappings: usize,
    index_crc: u32,
    /// The key in [`OPEN_LAYERS`]; `None` for a layer that is not shared, such as each one of image tables.
    identity: Option<Box<BlobIdentity>>,
}

impl Drop for SharedLayer {
    fn drop(&mut self) {
        if let Some(identity) = &self.identity {
            OPEN_LAYERS.remove(identity);
        }
    }
}

impl Layer {
    /// Loads a layer in any of its wrappers, and reads its index. Waits for a layer that is being
    /// sealed. Opens no file. If the process has already loaded the same bytes ([`Blob::identity`]),
    /// shares that layer and drops `blob`.
    ///
    /// # Errors
    /// [`Error::Source`] if the blob cannot be read, [`Error::Unsealed`] and [`Error::InUse`] for a
    /// writable layer; the others name the rule of the formats that the blob breaks.
    pub fn load(blob: Arc<Blob>) -> Result<(Self, Vec<Mapping>), Error> {
        let mut loaded = Self::load_once(Arc::clone(&blob));
        // A cache may hold wrong bytes, and headers have no checksum that names them.
        while loaded.as_ref().is_err_and(Error::breaks_format) && blob.distrust() {
            loaded = Self::load_once(Arc::clone(&blob));
        }
        blob.trust();
        let is_remote = blob.layer().file().is_none();
        loaded.map_err(|error| match is_remote && error.breaks_format() {
            true => Error::Served {
                source: Box::new(error),
            },
            false => error,
        })
    }

    fn load_once(blob: Arc<Blob>) -> Result<(Self, Vec<Mapping>), Error> {
        let name = blob.layer().clone();
        let Some(uuid) = wait_for_seal::wait(&blob)? else {
            let (shared, mappings) = SharedLayer::find_or_load(blob, None)?;
            return Ok((Self { name, shared }, mappings));
        };
        // The sealer may have appended to the file.
        let blob = Arc::new(blob.measured()?);
        let loaded = SharedLayer::find_or_load(blob.clone(), Some(uuid));
        let (shared, mappings) = loaded.map_err(|error| match error {
            Error::TooShort { layer, .. } => Error::Unsealed { layer },
            Error::Lsmt {
                layer,
                source: lsmt::Error::Magic(HeaderKind::Trailer),
                ..
            } => Error::Unsealed { layer },
            error => error,
        })?;
        blob.unlock()?;
        Ok((Self { name, shared }, mappings))
    }

    /// A layer of which all is known that loading it would read, and the block table of its ZFile.
    /// Reads nothing of the blob, and is not shared with other stacks.
    pub(super) fn known(blob: Arc<Blob>, record: LayerRecord, table: Option<BlockTable>) -> Self {
        let name = blob.layer().clone();
        if let Some((at, byte)) = record.last_byte {
            blob.map_ending_in(at, byte);
        }
        let map = record.zfile.zip(table);
        let map = map.map(|(header, table)| ZFileMap::new(header, table));
        let shared = SharedLayer {
            container: Container::new(blob, record.payload, map),
            trailer: record.trailer,
            trailer_at: record.trailer_at,
            mappings: usize::try_from(record.mappings).unwrap_or(usize::MAX),
            index_crc: record.index_crc,
            identity: None,
        };
        Self {
            name,
            shared: Arc::new(shared),
        }
    }

    /// What [`Layer::known`] takes, but for the block table. `sampled` is the hash of the samples of the
    /// layer's data, if it was computed.
    pub(super) fn record(&self, sampled: Option<u64>) -> LayerRecord {
        let container = self.container();
        LayerRecord {
            blob_len: container.blob().len(),
            last_byte: container.blob().last_byte(),
            payload: container.payload(),
            zfile: container.zfile_map().map(|map| *map.header()),
            trailer: self.trailer().clone(),
            trailer_at: self.shared.trailer_at,
            mappings: self.mappings() as u64,
            index_crc: self.index_crc(),
            sampled,
        }
    }

    /// Blob of the layer, with its wrappers.
    #[inline]
    pub fn container(&self) -> &Container {
        &self.shared.container
    }

    /// The name of the layer in its stack.
    pub fn layer_ref(&self) -> &LayerRef {
        &self.name
    }

    /// The header at the end of the layer.
    pub fn trailer(&self) -> &Header {
        &self.shared.trailer
    }

    /// Uuid of the layer; nil if it has none.
    pub fn uuid(&self) -> Uuid {
        self.trailer().uuid
    }

    /// Uuid of its parent, the layer it was made upon; nil if it has none.
    pub fn parent_uuid(&self) -> Uuid {
        self.trailer().parent_uuid
    }

    /// Number of mappings, without padding.
    pub fn mappings(&self) -> usize {
        self.shared.mappings
    }

    /// Checksum of the index as stored in the layer.
    pub fn index_crc(&self) -> u32 {
        self.shared.index_crc
    }
}

impl SharedLayer {
    /// Finds the open layer with the bytes of `blob`, or loads `blob`. Reads the index in either case:
    /// mappings are not kept. `began` is the uuid that the blob had as a writable layer.
    fn find_or_load(
        blob: Arc<Blob>,
        began: Option<Uuid>,
    ) -> Result<(Arc<Self>, Vec<Mapping>), Error> {
        let identity = blob.identity()?;
        if let Some(open) = identity.as_ref().and_then(|known| OPEN_LAYERS.find(known)) {
            let mut reader = Reader::new();
            let index = read_index(&open.container, &open.trailer, open.trailer_at, &mut reader)?;
            return Ok((open, index.mappings));
        }
        let (mut layer, mappings) = Self::within(Container::load(blob)?, began)?;
        layer.identity = identity.clone().map(Box::new);
        let shared = match identity {
            Some(identity) => OPEN_LAYERS.enter(layer, &identity),
            None => Arc::new(layer),
        };
        Ok((shared, mappings))
    }

    /// Reads header, trailer and index of the layer in a container; `began` as in
    /// [`SharedLayer::find_or_load`].
    fn within(container: Container, began: Option<Uuid>) -> Result<(Self, Vec<Mapping>), Error> {
        let layer = || container.blob().layer().clone();
        let trailer_at = match began {
            // Guest data may look like a trailer, so one is looked for only if its uuid can be compared.
            Some(uuid) if uuid.is_nil() => last_trailer(&container)?,
            _ => layer_trailer(&container)?,
        };
        let broken = |offset, source| Error::Lsmt {
            layer: layer(),
            offset,
            source,
        };

        let mut reader = Reader::new();
        let mut bytes = [0; HEADER_LEN];
        reader.read_layer(&container, 0, &mut bytes)?;
        Header::decode(&bytes, HeaderKind::Header).map_err(|source| broken(0, source))?;
        reader.read_layer(&container, trailer_at, &mut bytes)?;
        // Fields come from the trailer: sealing in place does not update the header.
        let trailer = Header::decode(&bytes, HeaderKind::Trailer);
        let trailer = trailer.map_err(|source| broken(trailer_at, source))?;
        if began.is_some_and(|uuid| !uuid.is_nil() && uuid != trailer.uuid) {
            // This is guest data that looks like a trailer.
            return Err(Error::Unsealed { layer: layer() });
        }

        let index = read_index(&container, &trailer, trailer_at, &mut reader)?;
        let layer = Self {
            container,
            trailer,
            trailer_at,
            mappings: index.mappings.len(),
            index_crc: index.crc,
            identity: None,
        };
        Ok((layer, index.mappings))
    }
}

/// The index of a layer.
struct ReadIndex {
    mappings: Vec<Mapping>,
    /// Checksum of all of its bytes.
    crc: u32,
}

/// Reads the whole index of a layer whose trailer starts at byte `trailer_at`.
fn read_index(
    container: &Container,
    trailer: &Header,
    trailer_at: u64,
    reader: &mut Reader,
) -> Result<ReadIndex, Error> {
    let broken = |offset| {
        move |source| Error::Lsmt {
            layer: container.blob().layer().clone(),
            offset,
            source,
        }
    };
    let mut index = IndexReader::new(trailer, trailer_at).map_err(broken(trailer_at))?;
    let (mut mappings, mut crc) = (Vec::new(), 0);
    // `IndexReader::new` checked that the index ends before the trailer.
    let len = trailer.index_entries.saturating_mul(ENTRY_LEN as u64);
    let mut chunk = Vec::new();
    for at in (0..len).step_by(INDEX_CHUNK) {
        let left = len.saturating_sub(at).min(INDEX_CHUNK as u64);
        chunk.resize(left as usize, 0);
        reader.read_layer(
            container,
            trailer.index_offset.saturating_add(at),
            &mut chunk,
        )?;
        crc = crc::raw(crc, &chunk);
        let read = index.read(&chunk, &mut mappings);
        read.map_err(broken(trailer.index_offset))?;
    }
    Ok(ReadIndex { mappings, crc })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::{Path, PathBuf};

    use super::*;
    use crate::source::recorder::Recorder;

    /// An empty layer of this uuid.
    fn write(path: &Path, uuid: u128) {
        let header = Header::empty(1 << 20, Uuid::from_u128(uuid), Uuid::nil());
        let header = Header {
            index_offset: HEADER_LEN as u64,
            ..header
        };
        let bytes = [
            header.encode(HeaderKind::Header),
            header.encode(HeaderKind::Trailer),
        ];
        fs::write(path, bytes.concat()).unwrap();
    }

    fn open(path: &Path) -> Layer {
        Layer::load(Blob::open(path).unwrap().into()).unwrap().0
    }

    fn is_open(path: &Path) -> bool {
        let identity = Blob::open(path).unwrap().identity().unwrap();
        OPEN_LAYERS.find(&identity.unwrap()).is_some()
    }

    #[test]
    fn a_layer_is_opened_once_under_all_its_names() {
        let dir = tempfile::tempdir().unwrap();
        let (path, link): (PathBuf, PathBuf) = (dir.path().join("a"), dir.path().join("b"));
        write(&path, 1);
        fs::hard_link(&path, &link).unwrap();
        let (one, other) = (open(&path), open(&link));
        assert!(Arc::ptr_eq(&one.shared, &other.shared));
        assert_eq!(one.layer_ref(), &LayerRef::from(&path));
        assert_eq!(other.layer_ref(), &LayerRef::from(&link));
        drop(one);
        assert!(is_open(&path), "the other stack has it");
        drop(other);
        assert!(!is_open(&path));
    }

    #[test]
    fn a_recorded_layer_is_not_shared() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("layer");
        write(&path, 1);
        let shared = open(&path);
        let recorder = Arc::new(Recorder::default());
        let recorded = |number| {
            let blob = Blob::open(&path).unwrap();
            blob.start_recording(&recorder, number);
            Layer::load(blob.into()).unwrap().0
        };
        let (first, second) = (recorded(0), recorded(1));
        assert_eq!(recorder.units().len(), 2, "both read the only unit");
        for layer in [&first, &second] {
            assert!(!Arc::ptr_eq(&layer.shared, &shared.shared));
        }
        assert!(Arc::ptr_eq(&open(&path).shared, &shared.shared));
        assert!(!Arc::ptr_eq(&first.shared, &second.shared));
    }

    #[test]
    fn a_file_that_was_written_anew_is_another_layer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("layer");
        write(&path, 1);
        let before = open(&path);
        let next = dir.path().join("next");
        write(&next, 2);
        fs::rename(&next, &path).unwrap();
        let after = open(&path);
        assert!(!Arc::ptr_eq(&before.shared, &after.shared));
        assert_eq!(after.uuid(), Uuid::from_u128(2));
    }

    #[test]
    fn threads_that_open_a_layer_at_once_get_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("layer");
        write(&path, 1);
        let layers: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| open(&path))).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        });
        assert!(
            layers
                .iter()
                .all(|layer| Arc::ptr_eq(&layer.shared, &layers[0].shared))
        );
    }
}
