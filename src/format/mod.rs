//! On-disk structures of OverlayBD: bytes to structs and back, no I/O (`docs/format.md`).
//!
//! A layer blob is, from the outside in, an optional [`tar`] member, an optional [`zfile`]
//! (compressed blocks with a table of their lengths) and an [`lsmt`] layer: data, and an index that maps
//! sectors of the disk to it. The functions here parse bytes that the caller has read, and trust none of
//! them: lints forbid indexing and unchecked arithmetic.
#![cfg_attr(
    not(test),
    warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)
)]

pub mod crc;
pub mod digest;
pub mod download;
pub mod foreign;
pub mod lsmt;
pub mod presence;
pub mod tables;
pub mod tar;
pub mod trace;
pub mod zfile;

/// Which of the two headers of a layer or ZFile: the one at its start or the one at its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeaderKind {
    /// The header at the start.
    Header,
    /// The header at the end, whose fields are used.
    Trailer,
}

impl std::fmt::Display for HeaderKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            HeaderKind::Header => "header",
            HeaderKind::Trailer => "trailer",
        })
    }
}
