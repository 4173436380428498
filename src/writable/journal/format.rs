//! The bytes of a journal file: a head, then records of equal length.
#![cfg_attr(
    not(test),
    warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)
)]

use uuid::Uuid;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, little_endian};

use crate::format::crc;
use crate::format::lsmt::{ENTRY_LEN, Mapping};

/// The last byte is the version.
const MAGIC: [u8; 8] = *b"ovbdjrn3";

/// Stands for [`IndexPosition::entries`] that are not known.
const UNKNOWN: u64 = u64::MAX;

const KIND_MAPPING: u32 = 0;
const KIND_POSITION: u32 = 1;

/// First bytes of the file. Never written while the file has records.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct Head {
    magic: [u8; 8],
    /// Boot id of the running kernel, as text.
    boot: [u8; 36],
    /// The uuid of the writable layer.
    uuid: [u8; 16],
    crc: little_endian::U32,
}

impl Head {
    /// The head of the journal of a layer, for one boot of the kernel.
    pub(super) fn new(uuid: Uuid, boot: [u8; 36]) -> Self {
        let mut head = Self {
            magic: MAGIC,
            boot,
            uuid: *uuid.as_bytes(),
            crc: 0.into(),
        };
        head.crc = sum(head.as_bytes()).into();
        head
    }
}

/// Which mappings of the journal are in the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexPosition {
    /// Number of the first mapping that may not be in the index: all before it are.
    pub next: u64,
    /// Entry of the index that mapping `next` becomes. `None` while the index is rewritten.
    pub entries: Option<u64>,
}

/// The content of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// The mapping of an answered write.
    Mapping(Mapping),
    /// Which mappings are in the index.
    Position(IndexPosition),
}

/// The bytes of a record.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct Record {
    /// An index entry, or the two numbers of a position.
    payload: [u8; ENTRY_LEN],
    /// Number of the mapping, counted over both files; of a position, the number of the next mapping.
    number: little_endian::U64,
    kind: little_endian::U32,
    crc: little_endian::U32,
}

impl Record {
    /// The record of mapping number `number`.
    pub(super) fn mapping(mapping: Mapping, number: u64) -> Self {
        Self::new(mapping.encode(), number, KIND_MAPPING)
    }

    /// The record of a position, written before mapping number `number`.
    pub(super) fn position(position: IndexPosition, number: u64) -> Self {
        let mut payload = [0; ENTRY_LEN];
        let (next, entries) = payload.split_at_mut(8);
        next.copy_from_slice(&position.next.to_le_bytes());
        entries.copy_from_slice(&position.entries.unwrap_or(UNKNOWN).to_le_bytes());
        Self::new(payload, number, KIND_POSITION)
    }

    fn new(payload: [u8; ENTRY_LEN], number: u64, kind: u32) -> Self {
        let mut record = Self {
            payload,
            number: number.into(),
            kind: kind.into(),
            crc: 0.into(),
        };
        record.crc = sum(record.as_bytes()).into();
        record
    }

    /// The content of the record; `None` if it is damaged.
    fn content(&self) -> Option<Content> {
        if self.crc.get() != sum(self.as_bytes()) {
            return None;
        }
        match self.kind.get() {
            KIND_MAPPING => Mapping::decode(&self.payload, 0)
                .ok()?
                .map(Content::Mapping),
            KIND_POSITION => {
                let (next, entries) = self.payload.split_first_chunk()?;
                let entries = u64::from_le_bytes(*entries.first_chunk()?);
                Some(Content::Position(IndexPosition {
                    next: u64::from_le_bytes(*next),
                    entries: (entries != UNKNOWN).then_some(entries),
                }))
            }
            _ => None,
        }
    }
}

/// The checksum of a head or a record, whose last four bytes are the checksum itself.
fn sum(bytes: &[u8]) -> u32 {
    let summed = bytes.split_last_chunk::<4>();
    summed.map_or(0, |(summed, _)| crc::raw(crc::BLOCK_SEED, summed))
}

/// The content of one file.
#[derive(Debug, Default)]
pub(super) struct Contents {
    /// Mappings with their numbers, in order.
    pub(super) mappings: Vec<(u64, Mapping)>,
    /// Positions, in order.
    pub(super) positions: Vec<IndexPosition>,
    /// Number of the first record. `None` without records.
    pub(super) first: Option<u64>,
    /// Number of the next mapping.
    pub(super) next: u64,
    /// Bytes of the head and of the valid records.
    pub(super) len: u64,
}

impl Contents {
    /// The valid records up to the first damaged one, if the file belongs to the journal of `head`.
    pub(super) fn read(bytes: &[u8], head: &Head) -> Self {
        let mut contents = Self {
            len: size_of::<Head>() as u64,
            ..Self::default()
        };
        let Some(rest) = bytes.strip_prefix(head.as_bytes()) else {
            return contents;
        };
        for bytes in rest.chunks_exact(size_of::<Record>()) {
            let record = Record::read_from_bytes(bytes).ok();
            let Some((record, content)) =
                record.and_then(|record| Some((record, record.content()?)))
            else {
                break;
            };
            let number = record.number.get();
            contents.first.get_or_insert(number);
            match content {
                Content::Mapping(mapping) => {
                    contents.mappings.push((number, mapping));
                    contents.next = number.saturating_add(1);
                }
                Content::Position(position) => {
                    contents.positions.push(position);
                    contents.next = contents.next.max(number);
                }
            }
            contents.len = contents.len.saturating_add(size_of::<Record>() as u64);
        }
        contents
    }
}

/// Whether the file is a journal of the same layer and boot in the format of another version, and has records.
pub(super) fn is_other_version(bytes: &[u8], head: &Head) -> bool {
    let same = |from: usize, to: usize| bytes.get(from..to) == head.as_bytes().get(from..to);
    // Every version begins with magic, boot id, uuid. Version 2 has a head of 72 bytes.
    bytes.len() > 72 && same(0, 7) && !same(7, 8) && same(8, 60)
}
