//! A read-only disk through the socket. `contrib/ci/test` runs these tests once more with each set of
//! options that leads a read on another path.

mod golden;
mod recovery;
mod requests;
mod session;
mod tables;
