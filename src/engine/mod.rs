//! One worker per virtqueue: take chains, plan reads, serve them, answer.
//!
//! A [`worker`] is a queue's thread and [`queue_worker`] its loop. It sleeps until a kick, then takes
//! chains in batches and turns each into a [`request`]. The life of a read is in its types:
//!
//! ```text
//! Request -> Planned ----------------------> Reading --------------> Finished -> used ring
//!            plan, prefetch: what to read    pending in the ring,    answered, or left open
//!            comes into the cache            or with the fetcher     in the in-flight region
//!
//! Request -> Write ------------------------> Offloaded ------------> Finished
//!            into the page cache at once     flush, discard, zeroes
//! ```
//!
//! A read whose bytes are in memory is served and finished in one go. Bytes on storage are read by
//! the [`ring`], and absent bytes are fetched, while the worker goes on; those reads finish later, in
//! any order. Each way of waiting has its own budget, so that reads of absent bytes never hold up
//! reads of present ones. Answers are published in batches.
//!
//! Who owns what, and how much of it:
//!
//! | owner | owns | at most |
//! |---|---|---|
//! | [`queue_worker::QueueWorker`] | the queue, and every chain that was taken from it | the queue's size |
//! | [`prefetch::Prefetch`] | planned reads | 4 a step between batches |
//! | [`read::Reader`] | reads under way, in [`reading::Reads`] | 65536 pieces of guest memory |
//! | [`sources::Sources`] | the parts of reads that are pending | 16 a read |
//! | [`ring::Ring`] | buffers that the kernel fills | 64 reads |
//! | [`fetches::Fetches`] | parts that the fetcher was asked for | 64 |
//! | [`delivery::Delivery`] | decoders and two buffers | one of each |
//! | [`offload::Offload`] | the thread that flushes, discards and zeroes | 64 requests |
//! | [`pool::Pool`] | lists that requests use again | as many as were in use at a time |

mod backend;
pub mod delivery;
pub mod drop_behind;
pub mod fetches;
pub mod offload;
pub mod plan;
pub mod polling;
pub mod pool;
pub mod prefetch;
pub mod queue_worker;
pub mod ratelimited_log;
pub mod read;
pub mod readahead;
pub mod reading;
pub mod request;
pub mod ring;
pub mod setup;
pub mod sources;
pub mod worker;

pub use backend::{BackendOptions, BlockBackend, Tuning};
