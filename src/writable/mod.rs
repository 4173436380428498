//! Writable layers above an image, and both together as one disk.
//!
//! A [`WritableLayer`] is a pair of files: a data file, and an index file of mappings. A write goes to the data file
//! first: in place where the layer has data, else to free sectors. Its new mappings then enter the [`journal`] and the
//! map in memory ([`extent_map`]), and the write is answered. [`WritableLayer::flush`] makes the data durable, then
//! appends the mappings to the index ([`index_file`]) and makes the index durable. So an index entry never points at
//! data that a power loss can destroy, and no answered write is lost when the process dies.
//!
//! ```text
//! write -- data file -- map, journal -- answered ... flush: sync data -- append to index -- sync index
//! ```
//!
//! A [`Volume`] is an image under its writable layers. [`Volume::lookup`] finds the parts of a range that lie in them.
//! A bitmap ([`coverage`]) answers without a lock if there are none. The layers sealed since the start
//! share one index, as those of the image do ([`sealed`]). [`Snapshots`] freezes and seals the layers of a volume.
//!
//! A change that needs a flush first is repeated as [`FlushRetries`] allows, and one that finds the storage full as
//! [`OnFull`] says. The order of locks is a table in [`locks`].

mod above;
pub mod allocator;
pub mod at_rest;
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
mod remove;
mod reservation;
mod retry;
pub mod seal;
mod sealed;
pub mod snapshots;
pub mod volume;

pub use create::create;
pub use error::Error;
pub use layer::{Bounds, MAX_STEP, Options, WritableLayer};
pub use load::resize;
pub use lookup::{Lookup, Span, SpanContent};
pub use retry::{FlushRetries, OnFull};
pub use snapshots::{Snapshot, Snapshots};
pub use volume::Volume;

pub use crate::image::paths::Paths;
