//! Identities of layers and of stacks. A layer records the identity of the stack that it was made upon.
//!
//! The identity of a layer is its uuid, if it has one. Otherwise it is a hash of its structures and of
//! samples of its data (`sampling.rs`): the structures alone may be equal in layers of tools that write no uuids.

use std::fmt;

use uuid::Uuid;

/// FNV-1a with 64 bits. Not cryptographic: a forged identity does no harm.
pub struct Hash(u64);

impl Hash {
    /// The hash of no bytes.
    pub const EMPTY: Self = Self(0xcbf2_9ce4_8422_2325);

    /// Appends bytes.
    pub fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    /// Hash of all bytes that were appended.
    pub fn value(&self) -> u64 {
        self.0
    }
}

/// Identity of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerId {
    /// Uuid, not nil.
    Named(Uuid),
    /// Hash of the structures and of samples of the data.
    Sampled(u64),
}

impl LayerId {
    /// Identity of a layer with this uuid; `None` for the nil uuid.
    pub fn named(uuid: Uuid) -> Option<Self> {
        (!uuid.is_nil()).then_some(Self::Named(uuid))
    }
}

/// Identity of a stack: of its layers, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StackId(u64);

impl StackId {
    /// The identity of no layers.
    pub const EMPTY: Self = Self(Hash::EMPTY.0);

    /// Parses the text that [`fmt::Display`] writes.
    pub fn parse(text: &str) -> Option<Self> {
        let is_digit = |byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        let fits = text.len() == 16 && text.bytes().all(is_digit);
        let number = u64::from_str_radix(text, 16).ok()?;
        fits.then_some(Self(number))
    }

    /// Identity of this stack with `layer` on top.
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
