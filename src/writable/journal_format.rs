//! The bytes of a journal's file: a head, and records of one mapping each.

use uuid::Uuid;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, little_endian};

use crate::format::crc;
use crate::format::lsmt::{ENTRY_LEN, Mapping};

const MAGIC: [u8; 8] = *b"ovbdjrn2";

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct Head {
    magic: [u8; 8],
    /// Of the running system, as text.
    boot: [u8; 36],
    /// Of the writable layer.
    uuid: [u8; 16],
    /// Of the index, when the last flush ended.
    entries: little_endian::U64,
    crc: little_endian::U32,
}

impl Head {
    /// The head of a journal whose index has so many entries.
    pub(super) fn new(uuid: Uuid, boot: [u8; 36], entries: u64) -> Self {
        let mut head = Self {
            magic: MAGIC,
            boot,
            uuid: *uuid.as_bytes(),
            entries: 0.into(),
            crc: 0.into(),
        };
        head.set_entries(entries);
        head
    }

    /// Says another number of entries.
    pub(super) fn set_entries(&mut self, entries: u64) {
        self.entries = entries.into();
        self.crc = self.sum().into();
    }

    fn sum(&self) -> u32 {
        let len = size_of::<Self>() - size_of_val(&self.crc);
        crc::raw(crc::BLOCK_SEED, &self.as_bytes()[..len])
    }

    /// Whether `found` is whole, and the head of a journal of the same layer and system.
    fn owns(&self, found: &Self) -> bool {
        let whole = found.crc.get() == found.sum();
        whole && (self.magic, self.boot, self.uuid) == (found.magic, found.boot, found.uuid)
    }
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct Record {
    entry: [u8; ENTRY_LEN],
    /// Number of the record, over both files.
    number: little_endian::U64,
    crc: little_endian::U32,
    zero: [u8; 4],
}

impl Record {
    /// The record with this number.
    pub(super) fn new(mapping: Mapping, number: u64) -> Self {
        let mut record = Self {
            entry: mapping.encode(),
            number: number.into(),
            crc: 0.into(),
            zero: [0; 4],
        };
        record.crc = record.sum().into();
        record
    }

    fn sum(&self) -> u32 {
        crc::raw(
            crc::raw(crc::BLOCK_SEED, &self.entry),
            self.number.as_bytes(),
        )
    }
}

/// What one file holds.
#[derive(Default)]
pub(super) struct Contents {
    /// What its head says of the index.
    pub(super) entries: u64,
    /// Mappings with the numbers of their records.
    pub(super) records: Vec<(u64, Mapping)>,
}

impl Contents {
    /// What the file of these bytes holds: its valid records up to the first that is none, if the
    /// head is of the same layer and system as `head`.
    pub(super) fn read(bytes: &[u8], head: &Head) -> Self {
        let found = Head::read_from_prefix(bytes).ok();
        let Some((found, rest)) = found.filter(|(found, _)| head.owns(found)) else {
            return Self::default();
        };
        let whole = rest.chunks_exact(size_of::<Record>());
        let record = |bytes: &[u8]| {
            let record = Record::read_from_bytes(bytes).ok()?;
            let mapping = Mapping::decode(&record.entry, 0).ok()??;
            (record.crc.get() == record.sum()).then_some((record.number.get(), mapping))
        };
        Self {
            entries: found.entries.get(),
            records: whole.map_while(record).collect(),
        }
    }

    /// The number of the first record.
    pub(super) fn first(&self) -> Option<u64> {
        self.records.first().map(|(number, _)| *number)
    }
}
