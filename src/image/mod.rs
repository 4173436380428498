//! Layers merged into one disk.
