//! Bytes that tell where they belong, and a seeded generator: equal seeds, equal runs.

/// A small seeded generator (SplitMix64).
#[derive(Clone, Debug)]
pub struct Random(u64);

fn mix(mut value: u64) -> u64 {
    value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}

impl Random {
    /// The generator of this seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Any number.
    pub fn any(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: u64) -> u64 {
        ((u128::from(self.any()) * u128::from(end)) >> 64) as u64
    }

    /// A number of `range`, which is not empty.
    pub fn within(&mut self, range: std::ops::RangeInclusive<u64>) -> u64 {
        range.start() + self.below(range.end() - range.start() + 1)
    }

    /// Puts `items` in any order.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let other = self.below(last as u64 + 1) as usize;
            items.swap(last, other);
        }
    }

    /// Heads or tails.
    pub fn coin(&mut self) -> bool {
        self.any() & 1 == 1
    }
}

/// A disk of `len` bytes in which every 8 bytes differ by their position and by `seed`.
pub fn tagged(len: usize, seed: u64) -> Vec<u8> {
    let words = (0u64..).map(|word| mix(seed ^ word.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
    let mut bytes: Vec<u8> = words
        .take(len.div_ceil(8))
        .flat_map(u64::to_le_bytes)
        .collect();
    bytes.truncate(len);
    bytes
}

/// The first position at which two buffers differ, with what is there: short enough to print.
pub fn difference(found: &[u8], expected: &[u8]) -> Option<String> {
    if found == expected {
        return None;
    }
    if found.len() != expected.len() {
        return Some(format!(
            "{} bytes, expected {}",
            found.len(),
            expected.len()
        ));
    }
    let at = found.iter().zip(expected).position(|(a, b)| a != b)?;
    let end = expected.len().min(at + 16);
    Some(format!(
        "at byte {at}: {:02x?}, expected {:02x?}",
        &found[at..end],
        &expected[at..end]
    ))
}
