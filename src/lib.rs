//! Serves stacks of OverlayBD layers to virtual machines as vhost-user-blk devices.
//!
//! The modules are floors: a module may use only floors below its own, and a test
//! (`tests/project/architecture.rs`) holds them to that. From the guest down to the bytes:
//!
//! | floor | module | one line |
//! |---|---|---|
//! | 9 | [`node`] | many disks on one host: names, state, processes, API |
//! | 8 | [`daemon`] | command line to running device: socket, signals, readiness |
//! | 7 | [`vhost`] | vhost-user messages of one front-end start and stop queues |
//! | 6 | [`engine`] | one worker per queue: pop, parse, plan, read, finish |
//! | 6 | [`tool`] | what the `ovbd` image tool does, a command a file |
//! | 5 | [`fetch`] | the fetcher: bytes of blobs from registries into the cache |
//! | 5 | [`writable`] | the writable layer: where writes go, and how they last |
//! | 5 | [`virtio`] | what the guest says: memory, virtqueue, descriptor chain, block request |
//! | 4 | [`cache`] | the cache directory: blobs by digest, whole or in part |
//! | 4 | [`image`] | layers merged into one disk, and which bytes make up a range of it |
//! | 4 | [`registry`] | OCI registries: references, manifests, authentication, ranges of blobs |
//! | 3 | [`source`] | a blob's bytes, made local |
//! | 2 | [`codec`] | LZ4 and zstd blocks in and out |
//! | 1 | [`format`](mod@format) | on-disk structures: bytes to structs and back, no I/O |
//! | 0 | [`units`] | sectors and bytes that cannot be mixed |
//! | 0 | [`io`] | system helpers: mappings, memory of requests, waiting, hints to the processor |
//! | 0 | [`logging`], [`reason`](mod@reason) | log lines; an error and its causes, in one line |
//! | 0 | [`ratelimited_log`] | log lines that other parties can cause again and again |
//! | 0 | [`version`] | the version that the programs report |
//!
//! `docs/architecture.md` follows one read through them.

#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::unreachable,
        clippy::todo,
        clippy::unimplemented,
        clippy::too_many_lines
    )
)]

pub mod cache;
pub mod codec;
pub mod daemon;
pub mod engine;
pub mod fetch;
pub mod format;
pub mod image;
pub mod io;
pub mod logging;
pub mod node;
pub mod ratelimited_log;
pub mod reason;
pub mod registry;
pub mod source;
pub mod tool;
pub mod units;
pub mod version;
pub mod vhost;
pub mod virtio;
pub mod writable;
