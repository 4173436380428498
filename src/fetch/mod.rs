//! The fetcher: brings bytes of blobs from registries into the cache, the most urgent first.
//!
//! ```text
//!  disk process --Fetch--> session.rs --want--> schedule.rs   queues by cause, neighbours merged
//!       ^                     ^                      | next
//!       |                     |                      v
//!       |                     |                 worker.rs -- origin.rs: ranged GET
//!       |                     |                      |  64 KiB at a time, as the body streams in
//!       |                     |                      v
//!       '------Ready----------'<----arrived---- cache: Claim::store (pwrite, then the live bit)
//!
//!  keeper.rs: makes units durable, verifies and publishes full blobs, evicts
//!  fill.rs:   fetches whole blobs, for download.rs and `ovbd pull`
//! ```
//! Demand goes before replay, replay before read-ahead, read-ahead before background; demand has
//! threads of its own. A failed fetch is repeated as long as something waits for it, with growing
//! pauses; a client that opens a layer gets a definite refusal at once.
//!
//! The fetcher is a process of its own ([`process`]) in a sandbox ([`sandbox`]).
//!
//! Nothing here is precious. A fetcher that is killed leaves units in the page cache and no lock;
//! its successor says hello on the same sockets, and the disk processes repeat what was not
//! answered.

mod ahead;
mod blob;
mod counters;
mod download;
mod fetcher;
mod fill;
mod image_lookup;
mod keeper;
pub mod open;
mod origin;
mod pace;
pub mod process;
mod registry_blob;
pub mod resolve;
pub mod sandbox;
mod schedule;
mod session;
#[cfg(test)]
mod tests;
mod worker;

pub use blob::{BlobId, Offer};
pub use counters::{Counters, CountersSnapshot};
pub use download::Download;
pub use fetcher::{Fetcher, Options};
pub use fill::{FillError, FillOptions};
pub use origin::{Body, Failure, From, Origin};
pub use registry_blob::RegistryBlob;
