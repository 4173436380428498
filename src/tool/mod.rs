//! The commands of the `ovbd` image tool (`docs/ovbd.md`).
//!
//! Each command has a file with a function that takes a task and a progress bar. Long work runs on
//! all processors ([`in_order`]). Files are written through [`output`], so that a file is complete
//! or absent.

mod appender;
pub mod cache;
pub mod check;
pub mod commit;
pub mod create;
pub mod ctl;
mod error;
pub mod export;
mod in_order;
pub mod inspect;
mod jobs;
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
