//! The fetcher: brings bytes of blobs from registries into the cache, the most urgent first.
//!
//! ```text
//!  disk process --- socket ---> session ---want---> dispatcher ---> schedule: queues by urgency
//!       ^                          ^                    | next
//!       |                          |                    v
//!       |                          |                  worker ---> blob, its origin: ranged GET
//!       |                          |                    |           (registry_blob)
//!       |                          |                    v  64 KiB at a time, as the body streams in
//!       '--------- Ready ----------'<---- arrived --- cache: Claim::store (pwrite, then the live bit)
//! ```
//! Demand goes before replay, replay before read-ahead, read-ahead before background; demand has
//! threads of its own. Disks that share a fetcher take turns. A failed fetch is repeated as long as something waits for it, with growing
//! pauses; a client that opens a layer gets a definite refusal at once.
//!
//! A module uses only modules below it in this table. `tests/project/architecture.rs` holds the code to
//! that.
//!
//! | module | content |
//! |---|---|
//! | [`open`] | opens the layers of a stack; in the disk process |
//! | [`resolve`] | finds the layers of an image; in the process that starts the fetcher |
//! | [`process`] | the fetcher's process, and the keeper that starts it again |
//! | [`sandbox`] | what the fetcher's process gives up |
//! | [`image_lookup`] | from a reference to the layers of an image |
//! | [`fetcher`] | the threads of a fetcher |
//! | [`session`] | the connection to one disk process |
//! | [`offered`] | opens the blobs of a disk process |
//! | [`download`] | downloads blobs while a disk is served |
//! | [`fill`] | fetches and verifies a whole blob |
//! | [`upkeep`] | syncs, verifies, repairs and evicts blobs |
//! | [`worker`] | makes one request after the other |
//! | [`dispatcher`] | what is wanted, and by which waiter; shared by all threads |
//! | [`schedule`] | which units are fetched next |
//! | [`fair_queue`] | lets disks take turns |
//! | [`space`] | the storage of the cache, full or over its limits |
//! | [`open_blobs`] | the blobs that connections have open |
//! | [`blob`] | what the cache has of a blob, and where the rest comes from |
//! | [`sources`] | the origins of a blob, and their failures |
//! | [`malformed`] | counts malformed answers until they are a refusal |
//! | [`holder`] | disk processes that have a blob open |
//! | [`waiter`] | receivers of answers |
//! | [`registry_blob`] | a blob in a registry as an origin |
//! | [`origin`] | the interface to origins |
//! | [`counters`] | what was fetched, in numbers |
//! | [`ahead`] | finds sequential readers |
//! | [`pace`] | how much to ask for at once |
//! | [`jitter`] | random parts of pauses |
//! | [`locks`] | the order of locks |
//!
//! Nothing here is precious. A fetcher that is killed leaves units in the page cache and no lock;
//! its successor says hello on the same sockets, and the disk processes repeat what was not
//! answered.

mod ahead;
mod blob;
mod counters;
mod dispatcher;
mod download;
mod fair_queue;
mod fetcher;
mod fill;
mod holder;
mod image_lookup;
mod jitter;
mod locks;
mod malformed;
mod offered;
pub mod open;
mod open_blobs;
mod origin;
mod pace;
pub mod process;
mod registry_blob;
pub mod resolve;
pub mod sandbox;
mod schedule;
mod session;
mod sources;
mod space;
#[cfg(test)]
mod tests;
mod upkeep;
mod waiter;
mod worker;

pub use blob::{BlobId, Offer};
pub use counters::{Counters, CountersSnapshot};
pub use download::Download;
pub use fetcher::{Fetcher, Options};
pub use fill::{FillError, FillOptions};
pub use origin::{Body, Failure, From, Origin};
pub use registry_blob::RegistryBlob;
pub use session::MAX_OUTSTANDING;
