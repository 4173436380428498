//! The writable layer above an image, and the two as one disk.
//!
//! An [`WritableLayer`] is a pair of files: *data*, and an *index*, which is a log of mappings. A write goes
//! to the data file first: over what the upper already holds of that range, or to sectors of the
//! file that are free. The mapping of the latter then enters the map in memory ([`extent_map`]) and the
//! [`journal`], and the write is answered. [`WritableLayer::flush`] makes the data durable, then appends to
//! the index ([`index_file`]) what the journal held, and makes that durable: so no index entry ever points
//! at data that a power loss can take away, and a process that dies loses nothing it answered.
//!
//! ```text
//! write ── data file ── map, journal ── answered ─ ─ flush: sync data ── append to index ── sync index
//! ```
//!
//! A [`Volume`] is an image under its uppers. A read asks it for an [`Lookup`]: which parts of a
//! range lie in uppers. A bitmap ([`coverage`]) answers without a lock where nothing does. What
//! snapshots froze and sealed since the start is one index, like that of the image ([`sealed`]).

pub mod allocator;
pub mod coverage;
mod error;
pub mod extent_map;
mod flush;
pub mod index_file;
pub mod journal;
mod journal_format;
mod layer;
mod length;
pub mod load;
pub mod lookup;
pub mod manifest;
mod open;
mod reservation;
mod resize;
pub mod seal;
mod sealed;
pub mod snapshots;
pub mod volume;
mod write;

use std::path::PathBuf;
use std::str::FromStr;

pub use error::Error;
pub use flush::mappings;
pub use layer::{Options, WritableLayer, create};
pub use lookup::{Lookup, Span, SpanContent};
pub use resize::resize;
pub use snapshots::{Snapshot, Snapshots};
pub use volume::Volume;
pub use write::MAX_STEP;

/// The two files of a writable layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths {
    /// Header and data.
    pub data: PathBuf,
    /// Header and log of mappings. Its journal lies beside it.
    pub index: PathBuf,
}

impl FromStr for Paths {
    type Err = PathsSyntax;

    /// Reads `data=FILE,index=FILE`, in either order.
    fn from_str(text: &str) -> Result<Self, PathsSyntax> {
        let (data, index) = match text.strip_prefix("data=") {
            Some(rest) => rest.split_once(",index="),
            None => text
                .strip_prefix("index=")
                .and_then(|rest| rest.split_once(",data="))
                .map(|(index, data)| (data, index)),
        }
        .filter(|(data, index)| !data.is_empty() && !index.is_empty() && data != index)
        .ok_or(PathsSyntax)?;
        Ok(Self {
            data: data.into(),
            index: index.into(),
        })
    }
}

/// What should name the files of a writable layer does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected data=FILE,index=FILE")]
pub struct PathsSyntax;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_read_in_either_order() {
        let paths = Paths {
            data: "a,b=c".into(),
            index: "/i".into(),
        };
        assert_eq!("data=a,b=c,index=/i".parse(), Ok(paths.clone()));
        assert_eq!("index=/i,data=a,b=c".parse(), Ok(paths));
        for wrong in [
            "",
            "a",
            "data=a",
            "data=a,index=",
            "data=,index=b",
            "a,b",
            "data=a,index=a",
        ] {
            assert_eq!(wrong.parse::<Paths>(), Err(PathsSyntax), "{wrong}");
        }
    }
}
