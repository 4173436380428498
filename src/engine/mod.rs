//! Queue workers: one thread per virtqueue takes requests, serves them, and answers them.
//!
//! A [`worker`] is the thread of a queue, and [`queue_worker`] is its loop. The loop sleeps until a
//! kick, takes descriptor chains in batches, and makes a [`request`] of each. The state of a request
//! is its type:
//!
//! ```text
//! Request --> Planned ----> ActiveRead ----------------------> Finished --> used ring
//!             read_plan,    each subread is served at once,
//!             prefetch      or pending in one of three states:
//!
//!                           Queued ---> Reading     by io_uring
//!                             ^  '----> Fetching    by the fetcher
//!                             '-- room is used up --'
//!
//! Request --> Write ------> Offloaded -----------------------> Finished --> used ring
//!             page cache    flush, discard, write zeroes
//!                |            |
//!                '--> Paused -'   the storage is full: repeated each second
//! ```
//!
//! A subread is a run of bytes of one read that lies in one place: zeros, a range of a layer, or a
//! range of a data file. Subreads of bytes in memory are served at once. For the others the worker
//! does not wait: it serves further requests, and the read finishes when its last subread has. Reads
//! finish in any order. io_uring and the fetcher have a budget each, so that reads of absent bytes
//! never delay reads of present ones. Answers are published in batches.
//!
//! Each thing has one owner and a bound:
//!
//! | owner | owns | bound |
//! |---|---|---|
//! | [`queue_worker::QueueWorker`] | the virtqueue, and every chain taken from it | queue size |
//! | [`prefetch::Prefetch`] | planned reads | 4 at each of its steps, between batches |
//! | [`read_table::ReadTable`] | active reads, their pending subreads and the state of each | 65536 pieces of guest memory, 16 subreads a read |
//! | [`storage::Storage`] | the ring, and the ids of subreads that wait for room in it | 64 reads in the ring |
//! | [`ring::Ring`] | buffers that the kernel fills | one per read in the ring |
//! | [`fetches::Fetches`] | the permits to fetch, and the ids of subreads that wait for one | 64 permits |
//! | [`delivery::Delivery`] | decoders and buffers | one set |
//! | [`offload::Offload`] | the thread that flushes, discards and writes zeroes | 64 requests |
//! | [`queue_worker::QueueWorker`] | paused requests | queue size; with the active reads, 65536 pieces of guest memory |
//! | [`pool::Pool`] | lists for reuse by later requests | as many as were in use at once |

mod backend;
pub mod data_path;
pub mod delivery;
pub mod drop_behind;
pub mod fetches;
pub mod full_storage;
pub mod offload;
pub mod polling;
pub mod pool;
pub mod prefetch;
pub mod queue_worker;
pub mod rate_limit;
pub mod read_id;
pub mod read_plan;
pub mod read_table;
pub mod readahead;
pub mod reads;
pub mod request;
pub mod ring;
pub mod setup;
pub mod stats;
pub mod storage;
pub mod subreads;
pub mod worker;

pub use backend::{BackendOptions, BlockBackend, Tuning};
