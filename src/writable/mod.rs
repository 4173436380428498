//! The writable layer above an image, and the two as one disk.
//!
//! A [`WritableLayer`] is a pair of files: a data file, and an index file of mappings. A write goes to the
//! data file first: in place where the layer has data, else to free sectors. New mappings then enter the
//! [`journal`] and the map in memory ([`extent_map`]), and the write is answered. [`WritableLayer::flush`]
//! makes the data durable, then appends the mappings of the journal to the index ([`index_file`]), and makes
//! that durable. So no index entry ever points at data that a power loss can take away, and a process that
//! dies loses no write that it answered.
//!
//! ```text
//! write ── data file ── map, journal ── answered ─ ─ flush: sync data ── append to index ── sync index
//! ```
//!
//! A [`Volume`] is an image under its writable layers. A read asks it for a [`Lookup`]: which parts of a
//! range lie in them. Where none does, a bitmap ([`coverage`]) tells without a lock. The layers that
//! snapshots sealed since the start share one index, as those of the image do ([`sealed`]).
//!
//! The order in which locks are taken is a table in [`locks`].

pub mod allocator;
pub mod coverage;
mod create;
mod data_file;
mod error;
pub mod extent_map;
mod files;
mod growing_coverage;
pub mod index_file;
pub mod journal;
mod layer;
pub mod load;
mod locks;
pub mod lookup;
pub mod manifest;
mod reservation;
mod resize;
mod retry;
pub mod seal;
mod sealed;
pub mod snapshots;
pub mod volume;

use std::path::PathBuf;
use std::str::FromStr;

use crate::io::directory::parent_of;

pub use create::create;
pub use error::Error;
pub use extent_map::mappings;
pub use layer::{MAX_STEP, Options, WritableLayer};
pub use lookup::{Lookup, Span, SpanContent};
pub use resize::resize;
pub use retry::FlushRetries;
pub use snapshots::{Snapshot, Snapshots};
pub use volume::Volume;

/// The two files of a writable layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths {
    /// Header and data.
    pub data: PathBuf,
    /// Header and mappings. The journal lies beside it.
    pub index: PathBuf,
}

impl Paths {
    /// The directories of the files.
    pub fn directories(&self) -> Vec<PathBuf> {
        let mut directories: Vec<_> = [&self.data, &self.index]
            .map(|file| parent_of(file).to_owned())
            .into();
        directories.dedup();
        directories
    }

    /// Those of the files that are symbolic links, and may lead out of the directories.
    pub fn links(&self) -> Vec<PathBuf> {
        let files = [&self.data, &self.index].into_iter();
        files
            .filter(|file| file.is_symlink() && file.exists())
            .cloned()
            .collect()
    }
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

/// A text that does not name the files of a writable layer.
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
