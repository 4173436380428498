//! Where a blob's bytes come from.
