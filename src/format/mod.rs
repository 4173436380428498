//! On-disk structures of OverlayBD: bytes to structs and back, no I/O (`docs/format.md`).
//!
//! A layer blob is, from the outside in, an optional [`tar`] member, an optional [`zfile`]
//! (compressed blocks with a table of their lengths) and an [`lsmt`] layer: data, and an index that
//! says which sectors of the disk they are. Everything here takes bytes that the caller has read and
//! trusts none of them.

pub mod crc;
pub mod digest;
pub mod download;
pub mod foreign;
pub mod lsmt;
pub mod presence;
pub mod tar;
pub mod trace;
pub mod zfile;
