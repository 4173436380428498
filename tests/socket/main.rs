//! The daemon through its sockets, with front-ends and guests that keep to the protocol.

mod activation;
mod idle;
mod limits;
mod metrics;
mod migration;
mod reading;
mod reference_backend;
mod soak;
mod stopping;
mod takeover;
mod vmm_sequences;
mod writable;
