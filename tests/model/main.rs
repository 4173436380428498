//! Images and writable layers against plain models, by random operations in this process.

mod absent;
mod image;
mod snapshots;
mod space;
mod writable;
