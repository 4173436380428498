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
    #[error("{} is no {expected} of a writable layer", path.display())]
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
    #[error("index of writable layer {}", path.display())]
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
        "{} has as many entries as it may, {most}, and cannot be made anew; make room beside it, and \
         see that files can be made and renamed in its folder",
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
        "{}: data of {offset} at {moffset} of the data file, where it cannot be; commit the layer \
         and start a new one",
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
    #[error("{} and {} have different uuids; expected a pair made together", data.display(), index.display())]
    NoPair {
        /// The data file.
        data: PathBuf,
        /// The index file.
        index: PathBuf,
    },
    /// The layer is finished.
    #[error("{} is sealed; use it as a layer, and a new upper above it", path.display())]
    Sealed {
        /// The data file.
        path: PathBuf,
    },
    /// The layer was frozen by a snapshot, and the disk goes on in another one.
    #[error(
        "{} is frozen: by {}, the disk goes on above it in data={},index={}; name that pair",
        path.display(), list.display(), active.data.display(), active.index.display()
    )]
    GoesOn {
        /// The data file.
        path: PathBuf,
        /// The list that says so.
        list: PathBuf,
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
    #[error("{} holds as much as it may ({limit} bytes)", path.display())]
    Full {
        /// The data file.
        path: PathBuf,
        /// Most bytes of data.
        limit: u64,
    },
    /// A limit for a layer that has a place for every sector from the start.
    #[error("{} is a sparse layer, which takes no limit", path.display())]
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
        "{} has {most} mappings, the most a layer can have, and would need more; discard, or write over, \
         larger pieces, or take a snapshot, which begins a new layer",
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
        "{} holds writes in the format of another version; start and stop that version once, which \
         flushes them",
        path.display()
    )]
    JournalVersion {
        /// The journal file.
        path: PathBuf,
    },
    /// The journal cannot be emptied, and is as long as it may be.
    #[error("{} has {most} bytes, the most it may have, and cannot be emptied", path.display())]
    JournalFull {
        /// The journal file.
        path: PathBuf,
        /// Most bytes.
        most: u64,
    },
    /// No more layers can be put above each other.
    #[error(
        "the disk has as many layers or mappings as it may; merge layers with ovbd merge, and start \
         anew"
    )]
    TooTall,
    /// As many layers are open as there may be files.
    #[error(
        "the disk has {0} layers, and each is an open file: no more may be open; raise the limit \
         (RLIMIT_NOFILE, LimitNOFILE=), or merge layers with ovbd merge, and start anew"
    )]
    TooManyFiles(usize),
    /// The data file is shorter than what was written to it: to write behind its end would make
    /// zeros of what is missing.
    #[error(
        "somebody cut {} short: expected at least {expected} bytes, found {found}; put back what is \
         missing, or start again without it",
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
        "{} failed to become durable before, so nothing more is written to it; start again to go on \
         from what is durable",
        path.display()
    )]
    Broken {
        /// The data file.
        path: PathBuf,
    },
    /// A disk that writable layers cannot have.
    #[error("a disk of {0} bytes; expected a multiple of 512 above 0, at most 2^59")]
    Size(u64),
    /// A disk that shall become smaller than what it holds.
    #[error(
        "{} holds {beyond} bytes of data beyond byte {size}, the new end; --force drops it",
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
    #[error("the device is read-only")]
    ReadOnly,
    /// A flush must come first.
    #[error("the layer has no room before it is flushed")]
    FlushFirst,
    /// The list of snapshots was replaced and could not be made durable.
    #[error(
        "{} was replaced and may not stay so: no layer of a snapshot is finished before the daemon \
         starts again",
        path.display()
    )]
    ListMayReturn {
        /// The list.
        path: PathBuf,
    },
    /// The layer was frozen while the caller was about to write to it.
    #[error("the layer was frozen")]
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
