//! Errors of writable layers.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::Paths;
use crate::format::lsmt::{self, HEADER_LEN};
use crate::units::Sector;

/// A writable layer cannot be opened, read or written.
#[derive(Debug, Error)]
pub enum Error {
    /// An operation on a file as a whole failed.
    #[error("cannot {what} {}", path.display())]
    File {
        /// The operation, as `open`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Error of the system.
        source: io::Error,
    },
    /// Bytes of a file cannot be read or written.
    #[error("cannot {what} at byte {offset} of {}", path.display())]
    Bytes {
        /// The operation, as `write`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// First byte.
        offset: u64,
        /// Error of the system.
        source: io::Error,
    },
    /// A layer that is to be removed is open in another process.
    #[error(
        "{} is open in another process, such as a fork of this disk, which could not start again without it; stop that \
         process, or keep the snapshot",
        path.display()
    )]
    LayerInUse {
        /// The data file.
        path: PathBuf,
    },
    /// A file is not part of a writable layer.
    #[error("{} is not the {expected} of a writable layer", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// The expected kind of file.
        expected: &'static str,
        /// The broken rule.
        source: lsmt::Error,
    },
    /// A file is shorter than its header.
    #[error(
        "{} has {found} bytes; the {expected} of a writable layer has at least {HEADER_LEN}",
        path.display()
    )]
    TooShort {
        /// The file.
        path: PathBuf,
        /// The expected kind of file.
        expected: &'static str,
        /// Its length in bytes.
        found: u64,
    },
    /// An entry of the index breaks a rule of the format.
    #[error("the index file {} of a writable layer is damaged", path.display())]
    Entry {
        /// The index file.
        path: PathBuf,
        /// The broken rule.
        source: lsmt::Error,
    },
    /// A file has more index entries than are supported.
    #[error("{} has {entries} entries; at most {most} are supported", path.display())]
    TooManyEntries {
        /// The file.
        path: PathBuf,
        /// Number of entries.
        entries: u64,
        /// Most entries.
        most: u64,
    },
    /// The index has reached its limit of entries, and cannot be rewritten.
    #[error(
        "{} has {most} entries, the limit, and cannot be rewritten; free space, and allow the \
         daemon to create and rename files in its directory",
        path.display()
    )]
    IndexFull {
        /// The index file.
        path: PathBuf,
        /// Most entries.
        most: u64,
        /// Error of the rewrite.
        source: Box<Error>,
    },
    /// Two ranges of the disk share data, or data is in another place than this kind of layer requires. A write to one
    /// range would change another.
    #[error(
        "{}: data of {offset} of the disk is at {moffset} of the data file, which is shared or \
         misplaced; commit the layer and start a new one",
        path.display()
    )]
    Misplaced {
        /// The index file.
        path: PathBuf,
        /// Sector of the disk.
        offset: Sector,
        /// Sector of the data file.
        moffset: Sector,
    },
    /// The data file and the index file are not of the same layer.
    #[error("{} and {} have different uuids; expected the two files of one writable layer", data.display(), index.display())]
    NoPair {
        /// The data file.
        data: PathBuf,
        /// The index file.
        index: PathBuf,
    },
    /// A disk in use cannot shrink.
    #[error("the disk has {current} bytes; a disk in use can grow, not shrink to {size} bytes")]
    Shrinks {
        /// The requested size.
        size: u64,
        /// The current size.
        current: u64,
    },
    /// The layer is sealed.
    #[error("{} is sealed; use it as a layer below a new writable layer", path.display())]
    Sealed {
        /// The data file.
        path: PathBuf,
    },
    /// A snapshot froze the layer; another one is active.
    #[error(
        "{} is frozen by a snapshot; the manifest {} names data={},index={} as the active \
         pair; use that pair",
        path.display(), manifest.display(), active.data.display(), active.index.display()
    )]
    GoesOn {
        /// The data file.
        path: PathBuf,
        /// The manifest.
        manifest: PathBuf,
        /// The active pair.
        active: Paths,
    },
    /// Another process has the layer open.
    #[error(
        "{} is in use by another process; stop that process, or use `ovbd ctl` for a running disk",
        path.display()
    )]
    Busy {
        /// The data file.
        path: PathBuf,
    },
    /// The layer has reached its limit of data.
    #[error(
        "{} has reached its limit of {limit} bytes; discard data, or raise --upper-limit and restart",
        path.display()
    )]
    Full {
        /// The data file.
        path: PathBuf,
        /// Most bytes of data.
        limit: u64,
        /// Whether a flush will free space.
        will_free: bool,
    },
    /// A limit for a sparse layer, which has a place for every sector.
    #[error("--upper-limit is not supported for the sparse layer {}; use a hybrid layer", path.display())]
    NoLimit {
        /// The data file.
        path: PathBuf,
    },
    /// Data cannot be read.
    #[error(transparent)]
    Blob(#[from] crate::source::Error),
    /// The layers below cannot be read.
    #[error(transparent)]
    Image(#[from] crate::image::Error),
    /// The layer has reached its limit of mappings.
    #[error(
        "{} has {most} mappings, the limit of a layer; take a snapshot, which begins a new \
         layer, or discard or overwrite larger ranges",
        path.display()
    )]
    Fragmented {
        /// The data file.
        path: PathBuf,
        /// Most mappings.
        most: u64,
    },
    /// Another version of the program wrote the journal, since the system was started.
    #[error(
        "{} is a journal in the format of another version of the program; start and stop that version once to flush it",
        path.display()
    )]
    JournalVersion {
        /// The journal file.
        path: PathBuf,
    },
    /// The journal has reached its limit, and cannot be emptied.
    #[error("journal {} reached its limit of {most} bytes and cannot be emptied", path.display())]
    JournalFull {
        /// The journal file.
        path: PathBuf,
        /// Most bytes.
        most: u64,
    },
    /// The disk has reached its limit of layers or mappings.
    #[error(
        "the disk has reached its limit of layers or mappings; merge layers with `ovbd merge` \
         and restart the daemon"
    )]
    TooTall,
    /// The disk has as many layers as the process may open files.
    #[error(
        "the disk has {0} layers, each an open file, and the limit of open files is reached; \
         raise it (RLIMIT_NOFILE, LimitNOFILE=), or merge layers with `ovbd merge`, and restart \
         the daemon"
    )]
    TooManyFiles(usize),
    /// Another program truncated the data file: a write behind its end would turn the missing data into zeros.
    #[error(
        "another program truncated {}: expected at least {expected} bytes, found {found}; \
         restore the missing bytes, or restart the daemon without them",
        path.display()
    )]
    CutShort {
        /// The data file.
        path: PathBuf,
        /// Least length in bytes.
        expected: u64,
        /// Its length in bytes.
        found: u64,
    },
    /// A sync of the data file failed: the storage may have lost data that it had accepted.
    #[error("cannot sync {}", path.display())]
    DataLost {
        /// The data file.
        path: PathBuf,
        /// Error of the system.
        source: io::Error,
    },
    /// The storage lost data that it had accepted.
    #[error(
        "an earlier sync of {} failed, so writes are refused; restart the daemon to continue \
         from the last successful flush",
        path.display()
    )]
    Broken {
        /// The data file.
        path: PathBuf,
    },
    /// A size that the disk of a writable layer cannot have.
    #[error("disk size is {0} bytes; expected a multiple of 512 from 512 to 2^59")]
    Size(u64),
    /// The new size of a disk would drop data.
    #[error(
        "{} holds {beyond} bytes of data beyond byte {size}, the new end; --drop-data drops it",
        path.display()
    )]
    DataBeyond {
        /// The data file.
        path: PathBuf,
        /// The new size of the disk.
        size: u64,
        /// Bytes of data beyond it.
        beyond: u64,
    },
    /// The disk has no writable layer.
    #[error("the disk is read-only")]
    ReadOnly,
    /// Too many mappings wait for a flush.
    #[error("{most} mappings wait for a flush, the limit; flush the disk")]
    PendingFull {
        /// Most mappings.
        most: usize,
    },
    /// The manifest was replaced and could not be made durable.
    #[error(
        "the new snapshot manifest {} may not be durable; restart the daemon",
        path.display()
    )]
    ManifestMayRevert {
        /// The manifest.
        path: PathBuf,
    },
    /// The layer is frozen: the disk has another active one.
    #[error("the layer is frozen")]
    Frozen,
}

impl Error {
    /// Whether the storage has no space left, so that the same change may succeed later. A failed sync of data is none
    /// of these, whatever its reason: the data may be lost.
    pub(super) fn is_full(&self) -> bool {
        let source = match self {
            Error::File { source, .. } | Error::Bytes { source, .. } => source,
            Error::IndexFull { source, .. } => return source.is_full(),
            _ => return false,
        };
        let kinds = [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded];
        kinds.contains(&source.kind())
    }

    /// Makes the error of the operation `what` on the file `path`.
    pub(super) fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Error::File { what, path, source }
    }

    /// Makes the error of the operation `what` at byte `offset` of the file `path`.
    pub(super) fn bytes(
        what: &'static str,
        path: &Path,
        offset: u64,
    ) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Error::Bytes {
            what,
            path,
            offset,
            source,
        }
    }
}
