//! vhost-user: the messages of one front-end start and stop queues.
//!
//! A [`session`] serves one connection: it reads messages and gives them to its [`handler`], which
//! keeps what they say of each queue ([`vring`]) and runs a worker for each that is complete. When
//! the connection ends, the workers are stopped and drained, whatever the reason.

pub mod handler;
pub mod session;
pub mod vring;
