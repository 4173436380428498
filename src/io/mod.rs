//! System helpers that all modules may use: bitmaps, boot id, child processes, directories, mapped files,
//! memory of requests, limits, name resolution, peers of sockets, polling, prefetch hints, unix sockets.

pub mod bitmap;
pub mod boot;
pub mod child_status;
pub mod confine;
pub mod directory;
pub mod file_lock;
pub mod file_system;
pub mod heap;
pub mod interrupt;
pub mod lease;
pub mod mapped_file;
pub mod name_service;
pub mod peer;
pub mod poller;
pub mod prefetch;
pub mod processors;
mod range_table;
pub mod ranked_lock;
pub mod regular;
pub mod rlimit;
pub mod scatter;
pub mod section;
pub mod sigbus;
pub mod signal_event;
pub mod unix_stream;
pub mod vectored;
