//! The checksum of the ZFile format: CRC-32C without the usual inversions.

use crc_fast::{CrcAlgorithm, Digest};

/// Seed of the checksum that follows each compressed block.
///
/// With seed 0 a run of zero bytes has checksum 0, so a hole where a block should be would pass.
pub const BLOCK_SEED: u32 = 100_007;

/// Computes the CRC-32C (Castagnoli, reflected) of `bytes` with `seed` as the initial register, without
/// inversion before or after.
///
/// Headers, trailers and the block table use seed 0, blocks [`BLOCK_SEED`]. The result is the seed for the
/// bytes that follow.
pub fn raw(seed: u32, bytes: &[u8]) -> u32 {
    let mut digest = Digest::new_with_init_state(CrcAlgorithm::Crc32Iscsi, u64::from(seed));
    digest.update(bytes);
    // The library inverts the result.
    !(digest.finalize() as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values() {
        let ramp: Vec<u8> = (0..=255).collect();
        let cases: [(u32, &[u8], u32); 8] = [
            (0, b"123456789", 0x58E3_FA20),
            (BLOCK_SEED, b"123456789", 0x3C9B_D4E0),
            (!0, b"123456789", !0xE306_9283),
            (BLOCK_SEED, b"", 0x0001_86A7),
            (0, &[0; 32], 0),
            (BLOCK_SEED, &[0; 32], 0x2825_0FD2),
            (0, &ramp, 0x2436_A9DB),
            (BLOCK_SEED, &ramp, 0x68D9_A60D),
        ];
        for (seed, bytes, expected) in cases {
            assert_eq!(raw(seed, bytes), expected, "seed {seed}, {bytes:?}");
            let (head, rest) = bytes.split_at(bytes.len() / 3);
            assert_eq!(raw(raw(seed, head), rest), expected, "in two steps");
        }
    }
}
