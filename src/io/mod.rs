//! System helpers below every floor: boot id, mappings, memory of requests, waiting, hints.

pub mod boot;
pub mod interrupt;
pub mod mapping;
pub mod poller;
pub mod prefetch;
mod range_table;
pub mod regular;
pub mod scatter;
pub mod sigbus;
pub mod vectored;
