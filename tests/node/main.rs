//! `ovbd-node` through its API, with real disk processes.

mod faults;
mod lifecycle;
mod node;
mod soak;
mod units;
mod verbs;
