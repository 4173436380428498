//! What can go wrong with a writable layer.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::Paths;
use crate::format::lsmt::{self, HEADER_LEN};
use crate::units::Sector;

/// Why an upper cannot be opened, read or written.
#[derive(Debug, Error)]
pub enum Error {
    /// The system refuses something that is done to a file as a whole.
    #[error("cannot {what} {}", path.display())]
    File {
        /// What was tried, as `open`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Bytes cannot be read or written.
    #[error("cannot {what} at byte {offset} of {}", path.display())]
    Bytes {
        /// What was tried, as `write`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// What the system said.
        source: io::Error,
    },
    /// The file is no such file of a writable layer.
    #[error("{} is not the {expected} of a writable layer", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What it should be.
        expected: &'static str,
        /// What is wrong.
        source: lsmt::Error,
    },
    /// The file is shorter than what every such file starts with.
    #[error(
        "{} has {found} bytes; the {expected} of a writable layer has at least {HEADER_LEN}",
        path.display()
    )]
    TooShort {
        /// The file.
        path: PathBuf,
        /// What it should be.
        expected: &'static str,
        /// Bytes it has.
        found: u64,
    },
    /// An entry of the index breaks a rule.
    #[error("broken index of a writable layer: {}", path.display())]
    Entry {
        /// The index file.
        path: PathBuf,
        /// What is wrong.
        source: lsmt::Error,
    },
    /// The index is larger than any this program can hold.
    #[error("{} has {entries} entries; at most {most} are supported", path.display())]
    TooManyEntries {
        /// The index file.
        path: PathBuf,
        /// Entries it has.
        entries: u64,
        /// Entries it may have.
        most: u64,
    },
    /// The index has as many entries as it may, and a shorter one cannot take its place.
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
        /// Why it cannot.
        source: Box<Error>,
    },
    /// Two ranges of the disk have the same data, or data is not where this kind of layer has it:
    /// writing one would change another.
    #[error(
        "{}: data of {offset} of the disk is at {moffset} of the data file, which is shared or \
         misplaced; commit the layer and start a new one",
        path.display()
    )]
    Misplaced {
        /// The index file.
        path: PathBuf,
        /// Where on the disk.
        offset: Sector,
        /// Where in the data file.
        moffset: Sector,
    },
    /// Data and index were not made together.
    #[error("{} and {} have different uuids; expected the two files of one writable layer", data.display(), index.display())]
    NoPair {
        /// The data file.
        data: PathBuf,
        /// The index file.
        index: PathBuf,
    },
    /// A disk in use cannot become smaller.
    #[error("the disk has {current} bytes; a disk in use can grow, not shrink to {size} bytes")]
    Shrinks {
        /// The size asked for.
        size: u64,
        /// The size it has.
        current: u64,
    },
    /// The layer is finished.
    #[error("{} is sealed; use it as a layer below a new writable layer", path.display())]
    Sealed {
        /// The data file.
        path: PathBuf,
    },
    /// The layer was frozen by a snapshot, and the disk goes on in another one.
    #[error(
        "{} is frozen by a snapshot; the manifest {} names data={},index={} as the active \
         pair; use that pair",
        path.display(), manifest.display(), active.data.display(), active.index.display()
    )]
    GoesOn {
        /// The data file.
        path: PathBuf,
        /// The list that says so.
        manifest: PathBuf,
        /// The pair that is written to.
        active: Paths,
    },
    /// Somebody else has it open.
    #[error("{} is in use by another process", path.display())]
    Busy {
        /// The data file.
        path: PathBuf,
    },
    /// The upper is as large as it may be.
    #[error("{} has reached its limit of {limit} bytes", path.display())]
    Full {
        /// The data file.
        path: PathBuf,
        /// Most bytes of data.
        limit: u64,
        /// Whether a flush will free space.
        will_free: bool,
    },
    /// A limit for a layer that has a place for every sector from the start.
    #[error("{} is a sparse layer, which cannot have a limit", path.display())]
    NoLimit {
        /// The data file.
        path: PathBuf,
    },
    /// Data cannot be read back.
    #[error(transparent)]
    Blob(#[from] crate::source::Error),
    /// The layers below cannot be read.
    #[error(transparent)]
    Image(#[from] crate::image::Error),
    /// The upper is cut into as many pieces as a layer can describe.
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
    /// The journal was written by another version of the program, under this boot of the kernel.
    #[error(
        "{} is a journal in the format of another version; start and stop that version once to flush it",
        path.display()
    )]
    JournalVersion {
        /// The journal file.
        path: PathBuf,
    },
    /// The journal cannot be emptied, and is as long as it may be.
    #[error("{} has {most} bytes, the limit, and cannot be emptied", path.display())]
    JournalFull {
        /// The journal file.
        path: PathBuf,
        /// Most bytes.
        most: u64,
    },
    /// No more layers can be put above each other.
    #[error(
        "the disk has reached its limit of layers or mappings; merge layers with `ovbd merge` \
         and restart the daemon"
    )]
    TooTall,
    /// As many layers are open as there may be files.
    #[error(
        "the disk has {0} layers, each an open file, and the limit of open files is reached; \
         raise it (RLIMIT_NOFILE, LimitNOFILE=), or merge layers with `ovbd merge`, and restart \
         the daemon"
    )]
    TooManyFiles(usize),
    /// The data file is shorter than what was written to it: to write behind its end would make
    /// zeros of what is missing.
    #[error(
        "another program truncated {}: expected at least {expected} bytes, found {found}; \
         restore the missing bytes, or restart the daemon without them",
        path.display()
    )]
    CutShort {
        /// The data file.
        path: PathBuf,
        /// Bytes that were written.
        expected: u64,
        /// Bytes that are there.
        found: u64,
    },
    /// Storage lost data it had taken: nothing more is promised.
    #[error(
        "an earlier sync of {} failed, so writes are refused; restart the daemon to continue \
         from the last successful flush",
        path.display()
    )]
    Broken {
        /// The data file.
        path: PathBuf,
    },
    /// A disk that writable layers cannot have.
    #[error("disk size is {0} bytes; expected a multiple of 512 from 512 to 2^59")]
    Size(u64),
    /// A disk that shall become smaller than what it holds.
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
    /// The device has no upper.
    #[error("the disk is read-only")]
    ReadOnly,
    /// Too many mappings wait for a flush.
    #[error("{most} mappings wait for a flush, the limit; flush the disk")]
    PendingFull {
        /// Most mappings.
        most: usize,
    },
    /// The list of snapshots was replaced and could not be made durable.
    #[error(
        "{} was replaced, but the new one may not be durable; restart the daemon to complete \
         the layers of snapshots",
        path.display()
    )]
    ManifestMayRevert {
        /// The list.
        path: PathBuf,
    },
    /// The layer was frozen while the caller was about to write to it.
    #[error("the layer is frozen")]
    Frozen,
}

impl Error {
    /// Whether storage had no room.
    pub(super) fn is_full(&self) -> bool {
        let (Error::File { source, .. } | Error::Bytes { source, .. }) = self else {
            return false;
        };
        let kinds = [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded];
        kinds.contains(&source.kind())
    }

    /// Makes the error of something done to the file `path`.
    pub(super) fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Error::File { what, path, source }
    }

    /// Makes the error of something done at byte `offset` of the file `path`.
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
