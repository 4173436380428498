//! The descent of the merged index's tree, with the widest registers the processor has.
//!
//! Three functions do the same: one in plain Rust, the same one compiled for AVX2, and one that
//! compares eight keys per instruction with AVX-512. Which of them runs is decided once.
#![allow(unsafe_code)] // Code for some processors only is called once they are known to be such.

/// Keys of a node.
pub const WIDTH: usize = 16;

/// Sorted keys: of segments on the last level, above it the last key of each child, and the
/// greatest there is for what does not exist.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub struct Node(pub [u64; WIDTH]);

/// A static search tree: child `c` of node `n` of a level is node `16n + c` of the next.
#[derive(Debug, Default)]
pub struct Tree {
    /// All nodes, level by level, root first.
    pub nodes: Vec<Node>,
    /// Where in `nodes` each level starts.
    pub levels: Vec<usize>,
}

/// How to search. The variants but the first are only made where the processor can do them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Search {
    /// As any processor can.
    Portable,
    /// With AVX2.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// With AVX-512.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Search {
    /// The ways this processor can search, slowest first.
    pub fn available() -> Vec<Self> {
        #[cfg_attr(not(target_arch = "x86_64"), expect(unused_mut))]
        let mut ways = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") {
            ways.push(Self::Avx2);
            if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("popcnt") {
                ways.push(Self::Avx512);
            }
        }
        ways
    }

    /// The fastest of them.
    pub fn best() -> Self {
        Self::available().pop().unwrap_or(Self::Portable)
    }

    /// How many keys of the last level of `tree` are below `target`; at least one is not.
    #[inline]
    pub fn below(self, tree: &Tree, target: u64) -> Option<usize> {
        match self {
            Self::Portable => portable(tree, target),
            // SAFETY: the variant was made after AVX2 was found.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { avx2(tree, target) },
            // SAFETY: the variant was made after AVX-512F and POPCNT were found.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { avx512(tree, target) },
        }
    }
}

#[inline(always)]
fn portable(tree: &Tree, target: u64) -> Option<usize> {
    let mut at = 0;
    for level in &tree.levels {
        let keys = &tree.nodes.get(level + at)?.0;
        at = at * WIDTH + count(|n| keys[n] < target);
    }
    Some(at)
}

/// How many of the first `WIDTH` numbers hold; without a branch, as none can be foretold.
#[inline(always)]
fn count(holds: impl Fn(usize) -> bool) -> usize {
    (0..WIDTH).map(|n| u64::from(holds(n))).sum::<u64>() as usize
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn avx2(tree: &Tree, target: u64) -> Option<usize> {
    portable(tree, target)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,popcnt")]
fn avx512(tree: &Tree, target: u64) -> Option<usize> {
    use std::arch::x86_64::{__m512i, _mm512_cmplt_epu64_mask, _mm512_set_epi64};

    // One load: the eight words lie side by side.
    let load = |words: [u64; 8]| -> __m512i {
        let [a, b, c, d, e, f, g, h] = words.map(u64::cast_signed);
        _mm512_set_epi64(h, g, f, e, d, c, b, a)
    };
    let target = load([target; 8]);
    let below = |words| u32::from(_mm512_cmplt_epu64_mask(load(words), target));
    let mut at = 0;
    for level in &tree.levels {
        let keys = &tree.nodes.get(level + at)?.0;
        let (low, high) = (
            std::array::from_fn(|n| keys[n]),
            std::array::from_fn(|n| keys[n + 8]),
        );
        let mask = below(low) | below(high) << 8;
        at = at * WIDTH + mask.count_ones() as usize;
    }
    Some(at)
}
