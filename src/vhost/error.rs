//! Why a message is refused, and why a connection ends.

use std::io;

use super::channel::ChannelError;
use crate::engine::worker::StartFailure;
use crate::io::mapped_file::MapError;
use crate::virtio::inflight::{InflightError, Queues};
use crate::virtio::memory::MemoryError;
use crate::writable;

/// Why a connection ends.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Messages can no longer be exchanged.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// A message was refused, and the front-end did not ask for a reply that could say so.
    #[error("request {request} was refused")]
    Refused {
        /// The request's number.
        request: u32,
        /// Why.
        source: Refusal,
    },
    /// A newer front-end started a queue.
    #[error("another front-end started a queue and has taken the disk over")]
    TakenOver,
    /// The connection cannot be set up.
    #[error("cannot set up the connection")]
    Setup(#[source] io::Error),
}

/// Why a message is refused. It has no effect then.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The daemon does not serve such requests.
    #[error("request is not supported by a block device")]
    Unknown,
    /// The body has the wrong length, or fields that make no sense.
    #[error("body of request {request} has {len} bytes, which is not a valid length")]
    Body {
        /// The request's number.
        request: u32,
        /// The body's length.
        len: usize,
    },
    /// The wrong number of descriptors came along.
    #[error("descriptors of request {request}: expected {expected}, found {found}")]
    Descriptors {
        /// The request's number.
        request: u32,
        /// How many it has.
        expected: usize,
        /// How many came.
        found: usize,
    },
    /// A descriptor is of another kind than the request needs.
    #[error("descriptor: expected {expected}, found a file of mode {mode:#o}")]
    Kind {
        /// What it must be.
        expected: &'static str,
        /// The file's mode.
        mode: u32,
    },
    /// A file to map is on a file system that may wait for another process.
    #[error(
        "descriptor: expected shared memory (memfd, /dev/shm, hugetlbfs) or a file on a block device, found \
         a file of a file system without one (FUSE, network, overlay, btrfs): give the VMM's memory backend \
         share=on with memfd, /dev/shm or hugetlbfs"
    )]
    FileSystem,
    /// A descriptor cannot be examined.
    #[error("cannot examine the descriptor")]
    Examine(#[source] io::Error),
    /// Features that were not offered.
    #[error("feature bits {unknown:#x} were not offered; offered are {offered:#x}")]
    Features {
        /// The bits.
        unknown: u64,
        /// What was offered.
        offered: u64,
    },
    /// A queue that the device does not have.
    #[error("queue {index} does not exist; the disk has {count} queues")]
    Queue {
        /// The queue's number.
        index: u32,
        /// How many there are.
        count: usize,
    },
    /// A size that no queue can have.
    #[error("queue size {size}: expected a power of two up to {max}")]
    QueueSize {
        /// The size.
        size: u32,
        /// The largest one.
        max: u16,
    },
    /// A base that no ring can have.
    #[error("base {base} of queue {index}: expected at most 65535")]
    Base {
        /// The queue's number.
        index: u32,
        /// The base.
        base: u32,
    },
    /// Bytes outside the configuration space.
    #[error(
        "{size} bytes at offset {offset} of the configuration space; it has {CONFIG_SPACE} bytes"
    )]
    Config {
        /// Where they start.
        offset: u32,
        /// How many they are.
        size: u32,
    },
    /// An in-flight area for queues that the device cannot have.
    #[error(
        "in-flight area for {} queues of {} entries; expected 1 to {} queues of 1 to {}",
        queues.count, queues.size, device.count, device.size
    )]
    InflightSize {
        /// Queues asked for.
        queues: Queues,
        /// Queues there are.
        device: Queues,
    },
    /// The in-flight area cannot be used.
    #[error("cannot use the in-flight area")]
    Inflight(#[from] InflightError),
    /// Too many memory regions.
    #[error("more than {max} memory regions")]
    Slots {
        /// How many there may be.
        max: usize,
    },
    /// The guest's memory cannot be used.
    #[error("cannot change the guest memory")]
    Memory(#[from] MemoryError),
    /// The dirty log cannot be used.
    #[error("cannot map the dirty log")]
    Log(#[source] MapError),
    /// What was written cannot be made durable.
    #[error("cannot switch off the write cache")]
    Flush(#[source] writable::Error),
    /// A device state that this device did not save: its own is empty.
    #[error("device state has {len} bytes; expected 0")]
    DeviceState {
        /// Bytes of it.
        len: u64,
    },
    /// A queue cannot be served.
    #[error("cannot start queue {index}")]
    Start {
        /// The queue's number.
        index: u16,
        /// Why.
        source: StartFailure,
    },
}

/// Bytes of configuration space a front-end may ask for.
pub const CONFIG_SPACE: usize = 256;
