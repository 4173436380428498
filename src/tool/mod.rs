//! What the `ovbd` image tool does (`docs/ovbd.md`).
//!
//! Each command is a file: it takes a description of what to do and a progress bar, and returns
//! what came of it. Long work runs on all cores in [`in_order`]; whatever is written goes through
//! [`output`], so that a file is whole or not there.

mod appender;
pub mod cache;
pub mod check;
pub mod commit;
pub mod create;
pub mod ctl;
pub mod disk;
mod error;
pub mod export;
mod in_order;
pub mod inspect;
mod jobs;
pub mod layer_writer;
pub mod local;
pub mod merge;
mod name;
pub mod open_files;
mod output;
pub mod progress;
pub mod pull;
pub mod raw_image;
pub mod seal;
mod unit;
pub mod upper;
mod zfile_writer;

pub use error::Error;
