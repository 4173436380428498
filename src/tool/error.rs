//! Errors of the image tool.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::fetch::open::OpenError;
use crate::fetch::process::ProcessError;
use crate::fetch::resolve::ResolveError;
use crate::format::foreign::Foreign;
use crate::format::lsmt::{self, MAX_ENTRIES};
use crate::source::FetchError;
use crate::{codec, image, writable};

/// A layer or a raw image cannot be read, made or checked.
#[derive(Debug, Error)]
pub enum Error {
    /// The image config does not describe an image.
    #[error(transparent)]
    Config(#[from] image::config::Error),
    /// A stack of layers cannot be opened or read.
    #[error(transparent)]
    Image(#[from] image::Error),
    /// The layers of an image in a registry cannot be found.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// Layers in a registry cannot be opened.
    #[error(transparent)]
    Layers(#[from] OpenError),
    /// A layer cannot be checked, because its bytes cannot be fetched.
    #[error("cannot check {what}")]
    Unfetched {
        /// The layer.
        what: String,
        /// The fetcher's reason.
        source: FetchError,
    },
    /// The disk has no snapshot of this name.
    #[error("the disk has no snapshot {name:?}; it has: {}", list(names))]
    NoSnapshot {
        /// The name.
        name: String,
        /// The snapshots of the disk.
        names: Vec<String>,
    },
    /// A rollback would delete later snapshots.
    #[error(
        "a rollback to {name:?} deletes later snapshots ({}); add --delete-newer to do so",
        list(newer)
    )]
    NewerSnapshots {
        /// The snapshot.
        name: String,
        /// The later ones.
        newer: Vec<String>,
    },
    /// A writable layer cannot be opened, read or written.
    #[error(transparent)]
    Upper(#[from] writable::Error),
    /// The process that parsed the layers below did not answer with the header of a writable layer.
    #[error("the process that reads the layers answered with a malformed header")]
    Described(#[source] lsmt::Error),
    /// The raw image cannot be opened.
    #[error("cannot open {name}")]
    Open {
        /// The raw image.
        name: String,
        /// Error of the system.
        source: io::Error,
    },
    /// The raw image is a directory or another kind of file.
    #[error("{name}: expected a regular file, block device or pipe")]
    NotAnImage {
        /// The raw image.
        name: String,
    },
    /// The raw image starts or ends like an image of another format.
    #[error("{name} {kind}; expected a raw image: {}, or add --raw", kind.hint())]
    Foreign {
        /// The raw image.
        name: String,
        /// The format.
        kind: Foreign,
    },
    /// The raw image cannot be read.
    #[error("cannot read {name} at byte {offset}")]
    Read {
        /// The raw image.
        name: String,
        /// Byte at which reading failed.
        offset: u64,
        /// Error of the system.
        source: io::Error,
    },
    /// The raw image was truncated while it was read.
    #[error("{name} was truncated while it was read, at byte {offset}")]
    Shrunk {
        /// The raw image.
        name: String,
        /// Start of the range that was not read.
        offset: u64,
    },
    /// The raw image has no bytes.
    #[error("{name} is empty; a disk needs at least one byte")]
    Empty {
        /// The raw image.
        name: String,
    },
    /// The raw image is larger than a layer can describe.
    #[error("{name} has more than 2^59 bytes, the limit of a layer")]
    TooLarge {
        /// The raw image.
        name: String,
    },
    /// The output cannot be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The output.
        path: PathBuf,
        /// Error of the system.
        source: io::Error,
    },
    /// Standard output cannot be written.
    #[error("cannot write to standard output")]
    Stdout(#[source] io::Error),
    /// The output exists and is not a regular file.
    #[error("{} exists and is not a regular file; choose another output path", path.display())]
    NotAFile {
        /// The output.
        path: PathBuf,
    },
    /// The output is one of the inputs.
    #[error("{} is also an input; choose another output path", path.display())]
    OutputIsInput {
        /// The output.
        path: PathBuf,
    },
    /// The layer would need more mappings than the format allows.
    #[error(
        "{} would need more than {MAX_ENTRIES} mappings, the most a layer can have; merge fewer \
         layers, or run `ovbd export`, then `ovbd create`, which stores whole 4 KiB units",
        path.display()
    )]
    TooManyMappings {
        /// The output.
        path: PathBuf,
    },
    /// The text of a commit message leaves no room for the record of the layers below.
    #[error(
        "the commit message has {len} bytes; at most {most} fit beside the record of the layers below \
         (256 bytes in all)"
    )]
    LongMessage {
        /// Bytes of the text.
        len: usize,
        /// Bytes it may have.
        most: usize,
    },
    /// The text of a commit message ends like a record of the layers below.
    #[error(
        "the last line of the commit message has the form of a record of the layers below (\"made upon \
         ..., ... bytes\"); change that line"
    )]
    MessageIsRecord,
    /// The upstream reader cannot read a block of this length.
    #[error(
        "{}: block {block} does not compress and would take {stored} bytes, which upstream's \
         reader cannot read; use a smaller --block-size",
        path.display()
    )]
    BlockTooLong {
        /// The output.
        path: PathBuf,
        /// Number of the block.
        block: u64,
        /// Length of the stored block in bytes.
        stored: usize,
    },
    /// A block cannot be compressed.
    #[error("cannot compress a block")]
    Codec(#[from] codec::Error),
    /// No thread can be started, or a thread died.
    #[error("cannot run worker threads")]
    Threads(#[source] io::Error),
}

impl From<ProcessError> for Error {
    fn from(error: ProcessError) -> Self {
        OpenError::from(error).into()
    }
}

/// Names, for a message.
fn list(names: &[String]) -> String {
    match names {
        [] => "none".to_owned(),
        _ => names
            .iter()
            .map(|name| format!("{name:?}"))
            .collect::<Vec<_>>()
            .join(", "),
    }
}
