//! `ovbd-node` through its API, with real disk processes.

mod changes;
mod clients;
mod contract;
mod crash;
mod dashboard;
mod downgrade;
mod faults;
mod fetcher;
mod fields;
mod fuzz;
mod images;
mod lifecycle;
mod limits;
mod listeners;
mod many;
mod metrics;
mod node;
mod openapi;
mod requests;
mod soak;
mod units;
mod upgrade;
mod verbs;
