//! The commands of the `ovbd` image tool (`docs/ovbd.md`).
//!
//! Each command has a file with a function that takes a task and a progress bar. Long work runs on
//! all processors ([`in_order`]). Files are written through [`output`], so that a file is complete
//! or absent.
//!
//! A module uses only modules below it in this table. `tests/project/architecture.rs` holds the code to
//! that.
//!
//! | module | content |
//! |---|---|
//! | [`upper`] | `ovbd upper create` |
//! | [`trace`] | `ovbd trace` |
//! | [`seal`] | `ovbd seal` |
//! | [`resize`] | `ovbd resize` |
//! | [`pull`] | `ovbd pull` |
//! | [`inspect`] | `ovbd inspect` |
//! | [`export`] | `ovbd export` |
//! | [`ctl`] | `ovbd ctl` |
//! | [`snapshots`] | `ovbd snapshot` |
//! | [`merge`] | `ovbd merge` |
//! | [`create`] | `ovbd create` |
//! | [`commit`] | `ovbd commit` |
//! | [`check`] | `ovbd check` |
//! | [`cache`] | `ovbd cache` |
//! | [`node`] | `ovbd node` |
//! | [`remote`] | layers in registries, fetched by a process |
//! | [`sources`] | the files of a disk before the sandbox |
//! | [`made`] | the last line of a command that makes a file |
//! | [`progress`] | progress bars |
//! | [`unix_http`] | HTTP over unix sockets |
//! | [`raw_image`] | the input of `create` |
//! | [`name`] | uuids derived from content |
//! | [`layer_writer`] | writes a layer |
//! | [`zfile_writer`] | compresses a layer |
//! | [`chunks`] | pieces of a layer, compressed on all threads |
//! | [`in_order`] | work on all threads, with results in order |
//! | [`output`] | files that appear when they are complete |
//! | [`appender`] | writes a file from front to back |
//! | [`loaded_stack`] | layers and writable layer as one disk |
//! | [`unit`] | units of comparison and storage |
//! | [`open_files`] | the open files of a disk |
//! | [`paint`] | colours |
//! | [`table`] | tables and numbers for people |
//! | [`error`] | errors |

mod appender;
pub mod cache;
pub mod check;
mod chunks;
pub mod commit;
pub mod create;
pub mod ctl;
mod error;
pub mod export;
mod in_order;
pub mod inspect;
pub mod layer_writer;
pub mod loaded_stack;
pub mod made;
pub mod merge;
mod name;
pub mod node;
pub mod open_files;
pub mod output;
pub mod paint;
pub mod progress;
pub mod pull;
pub mod raw_image;
pub mod remote;
pub mod resize;
pub mod seal;
pub mod snapshots;
pub mod sources;
mod table;
pub mod trace;
mod unit;
mod unix_http;
pub mod upper;
mod zfile_writer;

pub use error::Error;
