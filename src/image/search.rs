//! Search in the merged index's tree, with the widest registers of the processor.
//!
//! Three functions compute the same: one in plain Rust, the same compiled for AVX2, and one that
//! compares eight keys per instruction with AVX-512. [`Search::best`] chooses one when an index is
//! built.
#![allow(unsafe_code)] // Functions with target features are called after the features were detected.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::io::section::Section;

/// Keys of a node.
pub const WIDTH: usize = 16;

/// Sorted keys: those of segments on the last level, the last key of each child above it. Unused
/// slots hold `u64::MAX`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C, align(64))]
pub struct Node(pub [u64; WIDTH]);

/// A static search tree: child `c` of node `n` of a level is node `16n + c` of the next.
#[derive(Debug, Default)]
pub struct Tree {
    /// All nodes, level by level, root first.
    pub nodes: Section<Node>,
    /// Index in `nodes` of the first node of each level.
    pub levels: Vec<usize>,
}

/// Instruction set of the search. Made by [`Search::best`], which detects what the processor supports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Search {
    /// Plain Rust, for any processor.
    Portable,
    /// AVX2.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512F and POPCNT.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Search {
    /// All instruction sets of this architecture, fastest first.
    #[cfg(target_arch = "x86_64")]
    pub(super) const ALL: [Self; 3] = [Self::Avx512, Self::Avx2, Self::Portable];

    /// All instruction sets of this architecture, fastest first.
    #[cfg(not(target_arch = "x86_64"))]
    pub(super) const ALL: [Self; 1] = [Self::Portable];

    /// Whether the processor supports the instruction set.
    pub(super) fn is_supported(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("popcnt")
            }
        }
    }

    /// Returns the fastest instruction set that the processor supports.
    pub fn best() -> Self {
        let best = Self::ALL.into_iter().find(|search| search.is_supported());
        best.unwrap_or(Self::Portable)
    }

    /// Returns how many keys of the last level of `tree` are below `target`, if not all are.
    #[inline]
    pub fn below(self, tree: &Tree, target: u64) -> Option<usize> {
        match self {
            Self::Portable => portable(tree, target),
            // SAFETY: `best` and the tests make the variant only if AVX2 is supported.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { avx2(tree, target) },
            // SAFETY: `best` and the tests make the variant only if AVX-512F and POPCNT are supported.
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

/// Counts the numbers below `WIDTH` for which `holds` is true. Without branches: their outcome would
/// be random.
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

    // Compiles to one load: the eight words are adjacent.
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
