//! `ovbd-node` through its API, with real disk processes.

mod changes;
mod contract;
mod crash;
mod dashboard;
mod downgrade;
mod faults;
mod fetcher;
mod fields;
mod images;
mod lifecycle;
mod limits;
mod many;
mod metrics;
mod node;
mod requests;
mod soak;
mod units;
mod upgrade;
mod verbs;
