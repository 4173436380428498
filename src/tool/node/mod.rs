//! `ovbd node`: requests to the API of a running `ovbd-node` (`docs/node.md`), and their answers as text.

pub mod client;
pub mod error;
pub mod events;
pub mod list;
mod samples;
pub mod top;
