//! The device's side of virtio-blk: guest memory, virtqueues, descriptor chains, block requests.
//!
//! [`queue`] takes the head of a chain from the available ring, [`chain`] walks the descriptors into
//! lists of guest [`memory`], and [`request`] reads the header; [`discard`] reads the ranges of a
//! DISCARD. The answer is a [`status`] byte and an entry of the used ring. [`config`] is what the
//! device offers. Two records are kept for the front-end: [`inflight`] of the chains that were taken
//! and not answered, and [`dirty_log`] of the pages that were written.

pub mod chain;
pub mod config;
pub mod dirty_log;
pub mod discard;
pub mod inflight;
pub mod memory;
pub mod queue;
pub mod request;
pub mod status;
