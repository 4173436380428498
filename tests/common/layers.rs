//! Builds layers for tests, from the structures up.

use std::path::{Path, PathBuf};

use ovbd_vhost::codec::Encoder;
use ovbd_vhost::format::zfile::{self, Algorithm, BlockFormat, Totals};
use ovbd_vhost::format::{crc, lsmt, tar};
use ovbd_vhost::units::Sector;
use uuid::Uuid;

use super::content::Random;

/// The header of a writable layer for a disk of `virtual_size` bytes.
pub fn upper_header(virtual_size: u64, uuid: Uuid) -> lsmt::Header {
    lsmt::Header::empty(virtual_size, uuid, Uuid::nil())
}

/// What a test wants in a layer. Add content in ascending order of sectors.
#[derive(Clone, Debug)]
pub struct LayerBuilder {
    virtual_size: u64,
    uuid: Uuid,
    parent: Uuid,
    pad_index: bool,
    data: Vec<u8>,
    entries: Vec<[u8; 16]>,
}

impl LayerBuilder {
    /// A layer of a disk of `virtual_size` bytes that maps nothing yet.
    pub fn new(virtual_size: u64) -> Self {
        Self {
            virtual_size,
            uuid: Uuid::nil(),
            parent: Uuid::nil(),
            pad_index: true,
            data: Vec::new(),
            entries: Vec::new(),
        }
    }

    /// Names the layer and the one below.
    pub fn uuids(mut self, uuid: u128, parent: u128) -> Self {
        self.uuid = Uuid::from_u128(uuid);
        self.parent = Uuid::from_u128(parent);
        self
    }

    /// Leaves out the padding entries at the end of the index, as sealing in place does.
    pub fn without_padding(mut self) -> Self {
        self.pad_index = false;
        self
    }

    /// Maps whole sectors of data at sector `start`.
    pub fn data(mut self, start: u64, bytes: &[u8]) -> Self {
        assert!(bytes.len().is_multiple_of(512));
        let max = usize::from(lsmt::MAX_LENGTH) * 512;
        let mut at = start;
        for part in bytes.chunks(max) {
            let length = (part.len() / 512) as u16;
            let moffset = self.position();
            let mapping = lsmt::Mapping::data(Sector(at), length, moffset).unwrap();
            self.entries.push(mapping.encode());
            self.data.extend_from_slice(part);
            at += u64::from(length);
        }
        self
    }

    /// Maps `sectors` sectors at `start` as zeros.
    pub fn zeroed(mut self, start: u64, sectors: u64) -> Self {
        let max = u64::from(lsmt::MAX_LENGTH);
        let mut at = start;
        while at < start + sectors {
            let length = (start + sectors - at).min(max) as u16;
            let moffset = self.position();
            let mapping = lsmt::Mapping::zeroed(Sector(at), length, moffset).unwrap();
            self.entries.push(mapping.encode());
            at += u64::from(length);
        }
        self
    }

    /// Adds data that nothing maps yet.
    pub fn raw_data(mut self, bytes: &[u8]) -> Self {
        assert!(bytes.len().is_multiple_of(512));
        self.data.extend_from_slice(bytes);
        self
    }

    /// Maps `sectors` sectors at `start` to the data at sector `data` of the layer's data, or as
    /// zeros: at most what one entry can tell.
    pub fn mapping(mut self, start: u64, sectors: u64, data: Option<u64>) -> Self {
        let (start, length) = (Sector(start), sectors as u16);
        let mapping = match data {
            Some(data) => lsmt::Mapping::data(start, length, Sector(8 + data)),
            None => lsmt::Mapping::zeroed(start, length, self.position()),
        };
        self.entries.push(mapping.unwrap().encode());
        self
    }

    /// Adds an index entry as it is, a padding entry or a wrong one.
    pub fn entry(mut self, entry: [u8; 16]) -> Self {
        self.entries.push(entry);
        self
    }

    /// Gives the last entry a tag.
    pub fn tag(mut self, tag: u8) -> Self {
        self.entries.last_mut().unwrap()[15] = tag;
        self
    }

    fn position(&self) -> Sector {
        Sector(8 + self.data.len() as u64 / 512)
    }

    /// The bytes of the layer.
    pub fn lsmt(&self) -> Vec<u8> {
        let mut entries = self.entries.clone();
        if self.pad_index {
            let padding = lsmt::padding_after(entries.len() as u64);
            entries.extend(std::iter::repeat_n(lsmt::PADDING, padding as usize));
        }
        let header = lsmt::Header {
            index_offset: 4096 + self.data.len() as u64,
            index_entries: entries.len() as u64,
            virtual_size: self.virtual_size,
            uuid: self.uuid,
            parent_uuid: self.parent,
            message: Vec::new(),
        };
        let mut bytes = header.encode(lsmt::HeaderKind::Header).to_vec();
        bytes.extend_from_slice(&self.data);
        bytes.extend_from_slice(entries.as_flattened());
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        bytes.extend_from_slice(&header.encode(lsmt::HeaderKind::Trailer));
        bytes
    }
}

/// How to pack a layer into a ZFile.
#[derive(Clone, Copy, Debug)]
pub struct Pack {
    /// Codec.
    pub algorithm: Algorithm,
    /// Uncompressed bytes in a block.
    pub block_size: u32,
    /// Whether blocks carry checksums.
    pub checksum: bool,
    /// Bytes of a dictionary that no block uses.
    pub dictionary_len: u32,
    /// Whether the header is overwritten at the end.
    pub overwrite: bool,
}

impl Default for Pack {
    fn default() -> Self {
        Self {
            algorithm: Algorithm::Lz4,
            block_size: 4096,
            checksum: true,
            dictionary_len: 0,
            overwrite: true,
        }
    }
}

/// Packs `plain` into a ZFile.
pub fn zfile(plain: &[u8], pack: Pack) -> Vec<u8> {
    let format = BlockFormat {
        algorithm: pack.algorithm,
        block_size: pack.block_size,
        checksum: pack.checksum,
        dictionary_len: pack.dictionary_len,
    };
    let mut bytes = zfile::initial_header(&format).to_vec();
    bytes.resize(bytes.len() + pack.dictionary_len as usize, 0xD1);
    let mut encoder = Encoder::new();
    let mut stored = Vec::new();
    for block in plain.chunks(pack.block_size as usize) {
        let start = bytes.len();
        encoder.encode(pack.algorithm, block, &mut bytes).unwrap();
        if pack.checksum {
            let checksum = crc::raw(crc::BLOCK_SEED, &bytes[start..]);
            bytes.extend_from_slice(&checksum.to_le_bytes());
        }
        stored.push((bytes.len() - start) as u32);
    }
    let table = zfile::encode_table(&stored);
    let totals = Totals {
        table_offset: bytes.len() as u64,
        blocks: stored.len() as u64,
        original_size: plain.len() as u64,
        table_crc: crc::raw(0, &table),
    };
    bytes.extend_from_slice(&table);
    bytes.extend_from_slice(&zfile::trailer(&format, &totals));
    if pack.overwrite {
        bytes[..512].copy_from_slice(&zfile::final_header(&format, &totals));
    }
    bytes
}

/// Wraps `payload` in a tar file.
pub fn wrap_tar(payload: &[u8]) -> Vec<u8> {
    let len = payload.len() as u64;
    let mut bytes = tar::prefix(len).to_vec();
    bytes.extend_from_slice(payload);
    bytes.resize(bytes.len() + tar::trailing(len) as usize, 0);
    bytes
}

/// Writes a file into `dir` and gives its path.
pub fn write(dir: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

/// Bytes that look random but are the same each time; about half of them compress.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random::new(seed);
    let bytes = (0..len).map(|at| {
        if at / 64 % 2 == 0 {
            random.any() as u8
        } else {
            seed as u8
        }
    });
    bytes.collect()
}
