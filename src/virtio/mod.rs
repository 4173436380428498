//! Device side of virtio-blk: guest memory, virtqueues, descriptor chains, block requests.
//!
//! [`queue`] takes the head of a chain from the available ring. [`chain`] walks its descriptors and
//! collects lists of guest [`memory`]. [`request`] parses the header, [`discard`] the ranges of DISCARD and
//! WRITE_ZEROES. An answer is a [`status`] byte and an entry of the used ring. [`config`] holds the feature
//! bits and the configuration space.
//!
//! Two records lie in memory that the front-end shares: [`inflight`] marks the chains that were taken and
//! not answered, [`dirty_log`] the pages that were written.
#![cfg_attr(not(test), warn(clippy::indexing_slicing))]

pub mod chain;
pub mod config;
pub mod dirty_log;
pub mod discard;
pub mod inflight;
pub mod memory;
pub mod queue;
pub mod request;
pub mod status;
