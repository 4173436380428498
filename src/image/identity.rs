//! Identities of layers and of stacks, by which a layer recognizes the stack it was made upon.
//!
//! A layer with a uuid is identified by it. A layer without one is identified by its structures and by
//! samples of its data: tools that write no uuids make layers whose structures are equal.

use std::fmt;

use uuid::Uuid;

use super::error::Error;
use super::layer::Layer;
use crate::format::lsmt::HEADER_LEN;

/// Samples of a layer's data.
const SAMPLES: u64 = 8;

/// Bytes of a sample.
const SAMPLE_LEN: u64 = 4096;

/// FNV-1a with 64 bits: nothing depends on it being hard to forge.
pub struct Hash(u64);

impl Hash {
    /// The hash of no bytes.
    pub const EMPTY: Self = Self(0xcbf2_9ce4_8422_2325);

    /// Adds bytes.
    pub fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    /// The hash of all bytes that were added.
    pub fn value(&self) -> u64 {
        self.0
    }
}

/// Identity of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerId {
    /// Its uuid, which is not nil.
    Named(Uuid),
    /// The hash of its structures and of samples of its data.
    Sampled(u64),
}

impl LayerId {
    /// The identity that a layer with this uuid has if that is not nil.
    pub fn named(uuid: Uuid) -> Option<Self> {
        (!uuid.is_nil()).then_some(Self::Named(uuid))
    }

    /// Reads the identity of a layer; of a layer without a uuid, also samples of its data.
    ///
    /// # Errors
    /// [`Error::Source`] if the samples cannot be read.
    pub(super) fn of(layer: &Layer) -> Result<Self, Error> {
        match Self::named(layer.uuid()) {
            Some(id) => Ok(id),
            None => Ok(Self::Sampled(sampled(layer)?)),
        }
    }
}

/// Identity of the layers of a stack, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StackId(u64);

impl StackId {
    /// The identity of no layers.
    pub const EMPTY: Self = Self(Hash::EMPTY.0);

    /// The identity with this text, which is that of its [`fmt::Display`].
    pub fn parse(text: &str) -> Option<Self> {
        let is_digit = |byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        let fits = text.len() == 16 && text.bytes().all(is_digit);
        let number = u64::from_str_radix(text, 16).ok()?;
        fits.then_some(Self(number))
    }

    /// The identity of the stack with another layer on top.
    #[must_use]
    pub fn below(self, layer: LayerId) -> Self {
        let mut hash = Hash::EMPTY;
        hash.add(&self.0.to_le_bytes());
        match layer {
            LayerId::Named(uuid) => {
                hash.add(b"uuid");
                hash.add(uuid.as_bytes());
            }
            LayerId::Sampled(sampled) => {
                hash.add(b"data");
                hash.add(&sampled.to_le_bytes());
            }
        }
        Self(hash.0)
    }
}

impl fmt::Display for StackId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Adds what the structures of a layer say about it.
pub(super) fn add_structures(hash: &mut Hash, layer: &Layer) {
    hash.add(layer.uuid().as_bytes());
    hash.add(layer.parent_uuid().as_bytes());
    hash.add(&layer.trailer().virtual_size.to_le_bytes());
    hash.add(&layer.index_crc().to_le_bytes());
    let zfile_map = layer.container().zfile_map();
    let table_crc = zfile_map.map_or(0, |zfile_map| zfile_map.header().extent.table_crc);
    hash.add(&table_crc.to_le_bytes());
}

/// The hash of a layer's structures and of samples of its data as stored. The wrapper and what follows
/// the layer do not count.
fn sampled(layer: &Layer) -> Result<u64, Error> {
    let mut hash = Hash::EMPTY;
    add_structures(&mut hash, layer);
    let container = layer.container();
    let (start, end) = match container.zfile_map() {
        None => (HEADER_LEN as u64, layer.trailer().index_offset),
        Some(zfile_map) => {
            let table = zfile_map.table();
            (table.offset(0), table.offset(table.blocks()))
        }
    };
    let len = end.saturating_sub(start);
    let sample_len = SAMPLE_LEN.min(len);
    let mut sample = vec![0; sample_len as usize];
    for number in 0..SAMPLES {
        // Below 2^63, as is every offset in a file.
        let at = u128::from(len - sample_len) * u128::from(number) / u128::from(SAMPLES - 1);
        let offset = container.payload().offset + start + at as u64;
        container.blob().read_exact_at(&mut sample, offset)?;
        hash.add(&sample);
    }
    Ok(hash.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_layers_counts() {
        let (a, b) = (LayerId::Named(Uuid::from_u128(1)), LayerId::Sampled(1));
        let one = StackId::EMPTY.below(a).below(b);
        assert_ne!(one, StackId::EMPTY.below(b).below(a));
        assert_ne!(one, StackId::EMPTY.below(b));
        assert_eq!(StackId::parse(&one.to_string()), Some(one));
        for text in [
            "",
            "+123456789abcdef",
            "0123456789ABCDEF",
            "0123456789abcdef0",
        ] {
            assert_eq!(StackId::parse(text), None, "{text}");
        }
    }
}
