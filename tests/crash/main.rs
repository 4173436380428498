//! A crash after each single step of what is done to a writable layer's files.

mod cache;
mod disk;
mod faults;
mod operations;
mod snapshots;
mod writable;
