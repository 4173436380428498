//! The project's own test front-end: the driver's and the VMM's side of a vhost-user-blk device.
//!
//! From guest memory up to whole checks:
//!
//! | file | one line |
//! |---|---|
//! | `memory` | guest memory in memfds: regions with holes and without, a bump allocator |
//! | `ring` | the driver's half of one split virtqueue: offer, publish, take |
//! | `queue` | descriptor chains of any shape over a ring; each answered exactly once |
//! | `load` | a prefilled ring kept full to a depth: nothing allocated per request |
//! | `mixed` | requests of all kinds at depth, checked against a model |
//! | `blk` | virtio-blk requests: header, data, status |
//! | `session` | one connection: negotiation, memory, starting and stopping queues |
//! | `returning` | a front-end that keeps memory, queues and in-flight region across connections |
//! | `guest` | a session with memory and queues, ready to read |
//! | `survivor` | a guest that connects again whenever its back-end ends, and checks what it wrote |
//! | `node` | the real `ovbd-node` binary as a child process |
//! | `raw` | vhost-user messages byte by byte, for what the polite front-end refuses to send |
//! | `programs` | where the programs under test are, and the folder for temporary files |
//! | `daemon` | the real `ovbd-vhost` binary as a child process |
//! | `fetch_processes` | the processes of a fetcher |
//! | `remote` | the daemon with a disk whose layers are in a registry |
//! | `recorder` | a file system in memory that records what is done to it, and fails or does not answer on demand |
//! | `reference` | a small back-end over a byte vector, to test the front-end itself |
//! | `registry_server` | a registry that does as a test says, down to the bytes on the wire |
//! | `delay` | a link with a round trip and a rate, between a program and a server |
//! | `namespace` | mount namespaces, for a program that sees other files |
//! | `name_server` | a name server that answers or is silent |
//! | `nginx` | Debian's `nginx`, in front of a registry or as a store |
//! | `object_store` | an object store with signed URLs, for a real registry to redirect to |
//! | `registries` | real registries on this machine, and what they hold |
//! | `certificates` | an authority, and certificates that it signs |
//! | `content` | bytes that tell where they belong, and a seeded generator |
//! | `golden`, `layers` | the golden images of `tests/data`, and layers made to order |
//! | `disk` | the daemon with the disk most tests read |
//! | `volume` | a disk without a daemon |
//! | `writable` | the daemon with that disk under a writable layer |
//! | `checks` | what any read-only back-end must do, whichever it is |
//!
//! Every wait has a limit of [`PATIENCE`], which only turns a hang into a failure: no verdict
//! depends on how long something takes.

pub mod blk;
pub mod certificates;
pub mod checks;
pub mod content;
pub mod daemon;
pub mod delay;
pub mod disk;
pub mod fetch_processes;
pub mod golden;
pub mod guest;
pub mod layers;
pub mod load;
pub mod memory;
pub mod mixed;
pub mod name_server;
pub mod namespace;
pub mod nginx;
pub mod node;
pub mod object_store;
pub mod programs;
pub mod queue;
pub mod raw;
pub mod recorder;
pub mod reference;
pub mod registries;
pub mod registry_server;
pub mod remote;
pub mod returning;
pub mod ring;
pub mod session;
pub mod survivor;
pub mod volume;
pub mod writable;

use std::time::Duration;

use ovbd_vhost::units::{Sector, SectorRange, Sectors};

/// `count` sectors of a disk from `start` on.
pub fn sectors(start: u64, count: u64) -> SectorRange {
    SectorRange::checked(Sector(start), Sectors(count)).expect("sectors of a disk")
}

/// How long an answer may take before a test calls it a hang.
pub const PATIENCE: Duration = Duration::from_secs(60);
