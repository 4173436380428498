//! Uuids derived from content, so that equal input gives equal output.

use uuid::{Builder, Uuid};

/// A uuid from the FNV-1a hash of all these bytes.
pub fn hashed(parts: &[&[u8]]) -> Uuid {
    let hash = parts.iter().copied().flatten().fold(
        0x6c62_272e_07bb_0142_62b8_2175_6295_c58d_u128,
        |hash, byte| (hash ^ u128::from(*byte)).wrapping_mul((1 << 88) + 0x13b),
    );
    Builder::from_custom_bytes(hash.to_le_bytes()).into_uuid()
}
