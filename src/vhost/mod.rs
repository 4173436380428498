//! vhost-user: the messages of one front-end start and stop queues.
//!
//! A [`session`] serves one connection: its [`channel`] reads messages, [`dispatch`] finds what each
//! asks for, and the [`handler`] does it: it keeps what the front-end says of each queue ([`vring`])
//! and runs a worker for each that is complete. Several front-ends may be connected; the one that
//! starts a queue has the disk ([`ownership`]). Each is told when the disk grows ([`config_change`]). When a connection ends, its workers are stopped and
//! drained, whatever the reason.

pub mod channel;
pub mod closing;
pub mod config_change;
mod dispatch;
pub mod error;
pub mod handler;
pub mod message;
pub mod ownership;
pub mod session;
pub mod vring;
