//! Writable layers above an image, and both together as one disk.
//!
//! A [`WritableLayer`] is a pair of files: a data file, and an index file of mappings. A write goes to the data file
//! first: in place where the layer has data, else to free sectors. New mappings then enter the [`journal`] and the map in
//! memory ([`extent_map`]), and the write is answered. [`WritableLayer::flush`] makes the data durable, then appends the
//! mappings of the journal to the index ([`index_file`]), and makes that durable. So an index entry never points at data
//! that a power loss can take away, and a process that dies loses no answered write.
//!
//! ```text
//! write -- data file -- map, journal -- answered ... flush: sync data -- append to index -- sync index
//! ```
//!
//! A [`Volume`] is an image under its writable layers. A read asks it for a [`Lookup`]: which parts of a range lie in
//! them. If none does, a bitmap ([`coverage`]) tells without a lock. The layers that snapshots sealed since the start
//! share one index, as those of the image do ([`sealed`]). [`Snapshots`] freezes and seals the layers of a volume.
//!
//! A change that needs a flush first is repeated as [`FlushRetries`] says. The order of locks is a table in [`locks`].

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
mod retry;
pub mod seal;
mod sealed;
pub mod snapshots;
pub mod volume;

pub use create::create;
pub use error::Error;
pub use layer::{MAX_STEP, Options, WritableLayer};
pub use load::resize;
pub use lookup::{Lookup, Span, SpanContent};
pub use retry::FlushRetries;
pub use snapshots::{Snapshot, Snapshots};
pub use volume::Volume;

pub use crate::image::paths::Paths;
