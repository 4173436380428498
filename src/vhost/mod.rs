//! vhost-user back-end: messages of front-ends start and stop queue workers.
//!
//! Each connection has a [`session`], whose messages are served by a thread ([`serving`]): the [`channel`]
//! receives each, [`dispatch`] decodes it, and the [`handler`] executes it. The handler keeps the description of each queue ([`vring`]) and runs a
//! queue worker for each complete one. When a connection ends, for any reason, its workers are
//! drained and stopped.
//!
//! Several front-ends may be connected. The one that starts a queue owns the disk ([`ownership`]), if the
//! [`takeover`] policy lets it have the disk. All are notified when the disk grows ([`config_change`]).
#![cfg_attr(not(test), warn(clippy::indexing_slicing))]

pub mod channel;
pub mod closing;
pub mod config_change;
mod dispatch;
pub mod error;
pub mod handler;
pub mod message;
pub mod ownership;
pub mod peer;
pub mod refusal;
pub mod serving;
pub mod session;
pub mod takeover;
pub mod vring;
