//! Reasons to refuse one message of a front-end.

use std::io;

use crate::engine::worker::StartFailure;
use crate::io::mapped_file::MapError;
use crate::virtio::inflight::{InflightError, Queues};
use crate::virtio::memory::MemoryError;
use crate::writable;

/// Reason to refuse a message, which has no effect then.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The back-end does not support the request.
    #[error("request is not supported by a block device")]
    Unknown,
    /// The body has the wrong length, or a field with an invalid value.
    #[error("body of request {request} has a wrong length ({len} bytes) or an invalid field")]
    Body {
        /// Number of the request.
        request: u32,
        /// Length of the body.
        len: usize,
    },
    /// The message has the wrong number of descriptors.
    #[error("descriptors of request {request}: expected {expected}, found {found}")]
    Descriptors {
        /// Number of the request.
        request: u32,
        /// Number of descriptors that the request needs.
        expected: usize,
        /// Number of descriptors received.
        found: usize,
    },
    /// A descriptor is of the wrong type.
    #[error("descriptor: expected {expected}, found a file of mode {mode:#o}")]
    FileKind {
        /// Type that the request needs.
        expected: &'static str,
        /// Mode of the file.
        mode: u32,
    },
    /// A file to map is on a file system whose page faults may wait for another process.
    #[error(
        "descriptor: expected shared memory (memfd, /dev/shm, hugetlbfs) or a file on a block device, found \
         a file of a file system without one (FUSE, network, overlay, btrfs): give the VMM's memory backend \
         share=on with memfd, /dev/shm or hugetlbfs"
    )]
    FileSystem,
    /// `fstat(2)` or a similar call on a descriptor fails.
    #[error("cannot examine the descriptor")]
    Examine(#[source] io::Error),
    /// The front-end acknowledged features that were not offered.
    #[error("feature bits {unknown:#x} were not offered; offered are {offered:#x}")]
    Features {
        /// Bits that were not offered.
        unknown: u64,
        /// Bits that were offered.
        offered: u64,
    },
    /// The device has no such queue.
    #[error("queue {index} does not exist; the disk has {count} queues")]
    Queue {
        /// Number of the queue.
        index: u32,
        /// Number of queues.
        count: usize,
    },
    /// No queue can have this size.
    #[error("queue size {size}: expected a power of two up to {max}")]
    QueueSize {
        /// Requested size.
        size: u32,
        /// Largest size.
        max: u16,
    },
    /// No ring can have this base.
    #[error("base {base} of queue {index}: expected at most 65535")]
    Base {
        /// Number of the queue.
        index: u32,
        /// Requested base.
        base: u32,
    },
    /// The range is outside the configuration space.
    #[error(
        "configuration space has {CONFIG_SPACE} bytes; the request is for {size} bytes at offset {offset}"
    )]
    Config {
        /// First byte of the range.
        offset: u32,
        /// Length of the range.
        size: u32,
    },
    /// The device has no queues of the number and size for which an in-flight area is requested.
    #[error(
        "in-flight area for {} queues of {} entries; expected 1 to {} queues of 1 to {}",
        queues.count, queues.size, device.count, device.size
    )]
    InflightSize {
        /// Requested queues.
        queues: Queues,
        /// Queues of the device.
        device: Queues,
    },
    /// The in-flight area cannot be used.
    #[error("cannot use the in-flight area")]
    Inflight(#[from] InflightError),
    /// The front-end adds too many memory regions.
    #[error("more than {max} memory regions")]
    Slots {
        /// Largest number.
        max: usize,
    },
    /// The guest memory cannot be mapped.
    #[error("cannot change the guest memory")]
    Memory(#[from] MemoryError),
    /// The dirty log cannot be mapped.
    #[error("cannot map the dirty log")]
    Log(#[source] MapError),
    /// The flush that switches off the write cache fails.
    #[error("cannot switch off the write cache")]
    Flush(#[source] writable::Error),
    /// The device state to load is not one that this back-end saved: those are empty.
    #[error("device state has {len} bytes; expected 0")]
    DeviceState {
        /// Length of the state.
        len: u64,
    },
    /// A queue worker cannot start.
    #[error("cannot start queue {index}")]
    Start {
        /// Number of the queue.
        index: u16,
        /// Reason.
        source: StartFailure,
    },
}

/// Length of the configuration space that a front-end may read.
pub const CONFIG_SPACE: usize = 256;
