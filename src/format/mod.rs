//! On-disk structures of OverlayBD: bytes to structs and back, no I/O (`docs/format.md`).
//!
//! A layer blob is, from the outside in, an optional [`tar`] member, an optional [`zfile`]
//! (compressed blocks with a table of their lengths) and an [`lsmt`] layer: data, and an index that
//! says which sectors of the disk they are. Everything here takes bytes that the caller has read and
//! trusts none of them: indexing and unchecked arithmetic are lints here.
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

/// Which of its two copies a header is: layers and ZFiles begin and end with one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeaderKind {
    /// The copy at the start.
    Header,
    /// The copy at the end, which counts.
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
