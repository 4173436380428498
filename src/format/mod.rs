//! On-disk structures of OverlayBD: bytes to structs and back, no I/O (`docs/format.md`).
