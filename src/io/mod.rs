//! System helpers below every floor: mappings, memory of requests, waiting, hints.

pub mod mapping;
pub mod poller;
pub mod prefetch;
pub mod scatter;
pub mod sigbus;
pub mod vectored;
