//! Images and writable layers against plain models, by random operations in this process.

mod image;
mod snapshots;
mod writable;
