//! What the tables say about a layer: all that opening it would read of it.

use std::time::Duration;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, little_endian};

use super::{TablesError, lsmt, tar, zfile};
use crate::format::HeaderKind;
use crate::format::digest::Digest;

/// Bytes of a record: its own fields, the trailer of the ZFile, and the start of the layer's trailer,
/// behind which are zeros.
pub const RECORD_LEN: usize = OWN_LEN + zfile::HEADER_LEN + LSMT_LEN;

const OWN_LEN: usize = size_of::<RawRecord>();

/// Bytes of an LSMT trailer that are kept.
const LSMT_LEN: usize = 512;

/// Bytes of an identity.
const IDENTITY_LEN: usize = 64;

const FLAG_ZFILE: u32 = 1 << 0;
const FLAG_LAST: u32 = 1 << 1;
const FLAG_SAMPLED: u32 = 1 << 2;

/// Identifies the bytes of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerIdentity {
    /// A local file, as it was last changed.
    File {
        /// Device number of its file system.
        device: u64,
        /// Its inode.
        inode: u64,
        /// Its length in bytes.
        len: u64,
        /// Time of the last write, in seconds and nanoseconds.
        modified: (i64, i64),
        /// Time of the last change of file or inode, in seconds and nanoseconds.
        changed: (i64, i64),
    },
    /// A blob of a registry.
    Blob(Digest),
}

/// How long a file must not have changed before it is read, on a file system whose times have
/// nanoseconds: longer than the kernel's clock takes to advance.
const QUIET: Duration = Duration::from_millis(50);

/// As [`QUIET`], on a file system whose times may have seconds only.
const COARSE_QUIET: Duration = Duration::from_secs(2);

impl LayerIdentity {
    /// Whether the next write to the layer, if there is one after `now`, will give it another
    /// identity. A write within one tick of the clock after the last one would not.
    ///
    /// `now` is the time since 1970.
    pub fn is_settled(&self, now: Duration) -> bool {
        let Self::File { changed, .. } = self else {
            return true;
        };
        let (Ok(seconds), Ok(nanos)) = (u64::try_from(changed.0), u32::try_from(changed.1)) else {
            return false;
        };
        let quiet = if nanos == 0 { COARSE_QUIET } else { QUIET };
        let age = now.checked_sub(Duration::new(seconds, nanos.min(999_999_999)));
        age.is_some_and(|age| age >= quiet)
    }

    /// The bytes of the identity: no two are the same.
    pub fn encode(&self) -> [u8; IDENTITY_LEN] {
        let mut bytes = [0; IDENTITY_LEN];
        let words = match self {
            Self::Blob(digest) => {
                bytes[0] = 1;
                bytes[8..40].copy_from_slice(digest.as_bytes());
                return bytes;
            }
            Self::File {
                device,
                inode,
                len,
                modified,
                changed,
            } => {
                let times = [modified.0, modified.1, changed.0, changed.1];
                let [a, b, c, d] = times.map(i64::cast_unsigned);
                [2, *device, *inode, *len, a, b, c, d]
            }
        };
        for (to, word) in bytes.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

/// All that opening a layer reads of it, but for its mappings and its block table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerRecord {
    /// Length of the blob in bytes.
    pub blob_len: u64,
    /// The last byte of the blob that is not zero, and where it is, if the blob is to be mapped.
    pub last_byte: Option<(u64, u8)>,
    /// Where in the blob the payload of a tar wrapper is; the whole blob without one.
    pub payload: tar::Payload,
    /// The ZFile in the payload, if the layer is compressed.
    pub zfile: Option<zfile::Header>,
    /// The layer's trailer.
    pub trailer: lsmt::Header,
    /// Byte of the layer at which the trailer starts.
    pub trailer_at: u64,
    /// Number of mappings, without padding.
    pub mappings: u64,
    /// Checksum of the index as stored in the layer.
    pub index_crc: u32,
    /// Hash of samples of the data, if it was computed.
    pub sampled: Option<u64>,
}

/// The fields of a record that are not copied from the layer.
#[derive(Clone, Copy, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawRecord {
    flags: little_endian::U32,
    index_crc: little_endian::U32,
    blob_len: little_endian::U64,
    last_at: little_endian::U64,
    last_byte: u8,
    zero: [u8; 7],
    payload_offset: little_endian::U64,
    payload_len: little_endian::U64,
    trailer_at: little_endian::U64,
    mappings: little_endian::U64,
    sampled: little_endian::U64,
    reserved: [little_endian::U64; 7],
}

impl LayerRecord {
    /// The bytes of the record.
    pub fn encode(&self) -> [u8; RECORD_LEN] {
        let flag = |set: bool, flag: u32| if set { flag } else { 0 };
        let flags = flag(self.zfile.is_some(), FLAG_ZFILE)
            | flag(self.last_byte.is_some(), FLAG_LAST)
            | flag(self.sampled.is_some(), FLAG_SAMPLED);
        let (last_at, last_byte) = self.last_byte.unwrap_or_default();
        let raw = RawRecord {
            flags: flags.into(),
            index_crc: self.index_crc.into(),
            blob_len: self.blob_len.into(),
            last_at: last_at.into(),
            last_byte,
            payload_offset: self.payload.offset.into(),
            payload_len: self.payload.len.into(),
            trailer_at: self.trailer_at.into(),
            mappings: self.mappings.into(),
            sampled: self.sampled.unwrap_or_default().into(),
            ..RawRecord::default()
        };
        let mut bytes = [0; RECORD_LEN];
        let (own, rest) = bytes.split_at_mut(OWN_LEN);
        let (zfile, lsmt) = rest.split_at_mut(zfile::HEADER_LEN);
        own.copy_from_slice(raw.as_bytes());
        if let Some(header) = &self.zfile {
            zfile.copy_from_slice(&zfile::trailer(&header.format, &header.totals));
        }
        let trailer = self.trailer.encode(HeaderKind::Trailer);
        lsmt.copy_from_slice(&trailer[..LSMT_LEN]);
        bytes
    }

    /// Reads a record, and holds it to the rules that a layer is held to.
    ///
    /// # Errors
    /// [`TablesError::Record`], [`TablesError::ZFile`] and [`TablesError::Lsmt`].
    pub fn decode(bytes: &[u8; RECORD_LEN]) -> Result<Self, TablesError> {
        let Ok((raw, rest)) = RawRecord::read_from_prefix(bytes) else {
            return Err(TablesError::Record("length of the record"));
        };
        let (zfile, lsmt) = rest.split_at(zfile::HEADER_LEN);
        let has = |flag: u32| raw.flags.get() & flag != 0;
        let mut trailer = [0; lsmt::HEADER_LEN];
        trailer[..LSMT_LEN].copy_from_slice(lsmt);
        let zfile = has(FLAG_ZFILE).then(|| read_zfile(zfile)).transpose()?;
        let record = Self {
            blob_len: raw.blob_len.get(),
            last_byte: has(FLAG_LAST).then(|| (raw.last_at.get(), raw.last_byte)),
            payload: tar::Payload {
                offset: raw.payload_offset.get(),
                len: raw.payload_len.get(),
            },
            zfile,
            trailer: lsmt::Header::decode(&trailer, HeaderKind::Trailer)?,
            trailer_at: raw.trailer_at.get(),
            mappings: raw.mappings.get(),
            index_crc: raw.index_crc.get(),
            sampled: has(FLAG_SAMPLED).then(|| raw.sampled.get()),
        };
        record.check()?;
        Ok(record)
    }

    fn check(&self) -> Result<(), TablesError> {
        let wrong = |what| Err(TablesError::Record(what));
        let tar::Payload { offset, len } = self.payload;
        if offset
            .checked_add(len)
            .is_none_or(|end| end > self.blob_len)
        {
            return wrong("payload outside the blob");
        }
        if i64::try_from(self.blob_len).is_err() {
            return wrong("blob longer than a file can be");
        }
        if self.last_byte.is_some_and(|(at, _)| at >= self.blob_len) {
            return wrong("last byte outside the blob");
        }
        let layer_len = match &self.zfile {
            None => len,
            Some(header) if header.totals.table_offset > len => {
                return wrong("blocks outside the payload");
            }
            Some(header) => header.totals.original_size,
        };
        let end = self.trailer_at.checked_add(lsmt::HEADER_LEN as u64);
        if end.is_none_or(|end| end > layer_len) {
            return wrong("trailer outside the layer");
        }
        Ok(())
    }
}

/// Reads the trailer of a ZFile, and compares its numbers with each other.
fn read_zfile(bytes: &[u8]) -> Result<zfile::Header, TablesError> {
    let Some(bytes) = bytes.first_chunk() else {
        return Err(TablesError::Record("length of the record"));
    };
    let header = zfile::Header::decode(bytes, HeaderKind::Trailer)?;
    let table = header.totals.blocks.checked_mul(4);
    let end = table.and_then(|len| len.checked_add(header.totals.table_offset));
    let end = end.ok_or(TablesError::Record("end of the block table"))?;
    Ok(zfile::reconcile(&header, &header, end)?)
}
