//! `ovbd-node` through its API, with real disk processes.

mod faults;
mod lifecycle;
mod node;
mod units;
mod verbs;
