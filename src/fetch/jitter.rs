//! Random parts of pauses, so that many processes do not do the same at once.

use std::hash::{BuildHasher, RandomState};

/// A random number between a half and one.
pub(super) fn jitter() -> f64 {
    let random = RandomState::new().hash_one(0u8);
    0.5 + 0.5 * (random >> 11) as f64 / (1u64 << 53) as f64
}
