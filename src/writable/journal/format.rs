//! The bytes of a journal file: a head, then records of equal length.

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

/// First bytes of the file. Written while the file has no records, and never again while it has.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct Head {
    magic: [u8; 8],
    /// Boot id of the running kernel, as text.
    boot: [u8; 36],
    /// Of the writable layer.
    uuid: [u8; 16],
    crc: little_endian::U32,
}

impl Head {
    /// The head of a journal of this layer under this boot of the kernel.
    pub(super) fn new(uuid: Uuid, boot: [u8; 36]) -> Self {
        let mut head = Self {
            magic: MAGIC,
            boot,
            uuid: *uuid.as_bytes(),
            crc: 0.into(),
        };
        let len = size_of::<Self>() - size_of_val(&head.crc);
        head.crc = crc::raw(crc::BLOCK_SEED, &head.as_bytes()[..len]).into();
        head
    }
}

/// How far the index has got with the records of the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexPosition {
    /// Number of the first record that the index need not hold: all before it are in the index.
    pub next: u64,
    /// Entry of the index that record `next` becomes. `None` while the index is written anew.
    pub entries: Option<u64>,
}

/// What a record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// A mapping that was answered for.
    Mapping(Mapping),
    /// How far the index has got.
    Position(IndexPosition),
}

/// The bytes of a record.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct Record {
    /// An index entry; or the two numbers of a position.
    payload: [u8; ENTRY_LEN],
    /// Number of the mapping over both files; of a position, that of the mapping to come.
    number: little_endian::U64,
    kind: little_endian::U32,
    crc: little_endian::U32,
}

impl Record {
    /// The record of the mapping with this number.
    pub(super) fn mapping(mapping: Mapping, number: u64) -> Self {
        Self::new(mapping.encode(), number, KIND_MAPPING)
    }

    /// The record of a position, written before the mapping with this number.
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
        record.crc = record.sum().into();
        record
    }

    fn sum(&self) -> u32 {
        let len = size_of::<Self>() - size_of_val(&self.crc);
        crc::raw(crc::BLOCK_SEED, &self.as_bytes()[..len])
    }

    /// What the record says; `None` if it is damaged.
    fn content(&self) -> Option<Content> {
        if self.crc.get() != self.sum() {
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

/// What one file holds.
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
            contents.len += size_of::<Record>() as u64;
        }
        contents
    }
}

/// Whether the file is the journal of the same layer and boot in the format of another version, and
/// has records.
pub(super) fn is_other_version(bytes: &[u8], head: &Head) -> bool {
    let same = |from: usize, to: usize| bytes.get(from..to) == head.as_bytes().get(from..to);
    // Every version begins so: magic, boot id, uuid. Version 2 has a head of 72 bytes.
    bytes.len() > 72 && same(0, 7) && !same(7, 8) && same(8, 60)
}
