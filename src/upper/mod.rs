//! The writable layer above an image, and the two as one disk.
//!
//! An [`Upper`] is a pair of files: *data*, and an *index*, which is a log of mappings. A write goes
//! to the data file first: over what the upper already holds of that range, or to sectors of the
//! file that are free. The mapping of the latter then enters the map in memory ([`map`]) and the
//! [`journal`], and the write is answered. [`Upper::flush`] makes the data durable, then appends to
//! the index ([`log`]) what the journal held, and makes that durable: so no index entry ever points
//! at data that a power loss can take away, and a process that dies loses nothing it answered.
//!
//! ```text
//! write ── data file ── map, journal ── answered ─ ─ flush: sync data ── append to index ── sync index
//! ```
//!
//! A [`Volume`] is an image under its uppers. A read asks it for an [`Overlay`]: which parts of a
//! range lie in uppers. A bitmap ([`touched`]) answers without a lock where nothing does. What
//! snapshots froze and sealed since the start is one index, like that of the image ([`sealed`]).

mod change;
mod error;
mod flush;
pub mod journal;
mod length;
pub mod list;
pub mod load;
pub mod log;
pub mod map;
mod open;
pub mod overlay;
mod record;
mod resize;
mod room;
pub mod seal;
mod sealed;
pub mod snapshots;
pub mod space;
pub mod touched;
pub mod volume;
mod writer;

use std::path::PathBuf;
use std::str::FromStr;

pub use change::MAX_STEP;
pub use error::Error;
pub use flush::mappings;
pub use overlay::{Overlay, Span, SpanContent};
pub use resize::resize;
pub use snapshots::{Snapshot, Snapshots};
pub use volume::Volume;
pub use writer::{Options, Upper, create};

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
