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
//!
//! A module uses only modules below it in this table. `tests/project/architecture.rs` holds the code to
//! that.
//!
//! | module | content |
//! |---|---|
//! | [`at_rest`] | snapshots of a disk that no process serves |
//! | [`snapshots`] | snapshots of a disk in use |
//! | [`volume`] | an image under its writable layers, as one disk |
//! | [`retry`] | which failed changes are repeated |
//! | [`above`] | the layers above the image at one moment |
//! | [`sealed`] | the sealed layers, folded into one |
//! | [`frozen`] | layers that snapshots froze |
//! | [`layer`] | a writable layer in use |
//! | [`reservation`] | space for the entries of an index file |
//! | [`data_file`] | the data file of a layer in use |
//! | [`load`] | reads the files of a layer that is not in use |
//! | [`create`] | creates the files of an empty layer |
//! | [`extent_map`] | where a layer has which sectors |
//! | [`seal`] | turns a data file into a read-only layer |
//! | [`index_file`] | the index file of a layer |
//! | [`growing_coverage`] | a coverage that follows the size of the disk |
//! | [`coverage`] | which sectors a layer may have, without a lock |
//! | [`lookup`] | the parts of a range that lie in writable layers |
//! | [`sealed_file`] | the data file of a sealed layer |
//! | [`manifest`] | which pairs of files there are |
//! | [`remove`] | removes the files of a layer |
//! | [`allocator`] | free sectors of a data file |
//! | [`locks`] | the order of locks |
//! | [`journal`] | mappings that are not in the index yet |
//! | [`files`] | names and durability of files |
//! | [`error`] | errors |

mod above;
pub mod allocator;
pub mod at_rest;
pub mod coverage;
mod create;
mod data_file;
mod error;
pub mod extent_map;
mod files;
mod frozen;
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
mod sealed_file;
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
