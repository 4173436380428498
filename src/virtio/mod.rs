//! What the guest says: its memory, virtqueues, descriptor chains and block requests.
//!
//! A kick tells that the available ring moved: [`queue`] takes a head from it, [`chain`] walks the
//! descriptors into lists of [`memory`], [`request`] reads the header ([`ranges`] what a DISCARD
//! carries), and the way back is a status byte and a used entry. [`inflight`] and [`dirty_log`] are notes about it for the front-end: what
//! a crash must not lose, and what a migration must copy.

pub mod chain;
pub mod config;
pub mod dirty_log;
pub mod discard;
pub mod inflight;
pub mod memory;
pub mod queue;
pub mod request;
pub mod status;
