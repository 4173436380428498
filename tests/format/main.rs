//! Formats on disk: images and writable layers that upstream's tools wrote, and damaged ones.

mod images;
mod tables;
mod writable;
