//! LZ4 and zstd blocks in and out, the latter straight into memory a guest may touch.
