//! `ovbd-node` through its API, with real disk processes.

mod changes;
mod contract;
mod faults;
mod lifecycle;
mod metrics;
mod node;
mod soak;
mod units;
mod verbs;
