//! The thread that makes changes of the state directory durable.
//!
//! Requests that arrive while the storage is busy wait, and are then written together: one `fsync` of the directory
//! serves all of them, and the journal of the file system has less to do.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use tokio::sync::oneshot;

use super::super::id::DiskId;
use crate::io::regular::create_regular;

/// Most changes that are written together.
const BATCH: usize = 64;

/// A change of a disk's files.
#[derive(Debug)]
pub(super) enum Change {
    /// The entry has this content from now on.
    Store(Vec<u8>),
    /// The entry becomes the mark of a removal.
    Mark,
}

#[derive(Debug)]
struct Request {
    id: DiskId,
    change: Change,
    done: oneshot::Sender<io::Result<()>>,
}

/// Sends changes to the thread.
#[derive(Debug)]
pub(super) struct Committer {
    requests: Sender<Request>,
}

impl Committer {
    /// Starts the thread, which ends when this is dropped.
    ///
    /// # Errors
    /// What the system reports.
    pub(super) fn start(disks: PathBuf) -> io::Result<Self> {
        let (requests, waiting) = channel();
        thread::Builder::new()
            .name("state".to_owned())
            .spawn(move || run(&disks, &waiting))?;
        Ok(Self { requests })
    }

    /// Makes a change, and returns when it is durable.
    ///
    /// # Errors
    /// What the system reports. If the directory cannot be synced, the change may have been made all the same.
    pub(super) async fn commit(&self, id: &DiskId, change: Change) -> io::Result<()> {
        let (done, committed) = oneshot::channel();
        let id = id.clone();
        let ended = |_| io::Error::other("the thread of the state directory has ended");
        let request = Request { id, change, done };
        self.requests
            .send(request)
            .map_err(|_| io::Error::other("the thread of the state directory has ended"))?;
        committed.await.map_err(ended)?
    }
}

/// Path of a disk's entry.
pub(super) fn entry_path(disks: &Path, id: &DiskId) -> PathBuf {
    disks.join(format!("{id}.json"))
}

/// Path of the mark of a disk that is being removed.
pub(super) fn mark_path(disks: &Path, id: &DiskId) -> PathBuf {
    disks.join(format!("{id}.deleting"))
}

fn temporary_path(disks: &Path, id: &DiskId) -> PathBuf {
    disks.join(format!("{id}.tmp"))
}

fn run(disks: &Path, waiting: &Receiver<Request>) {
    while let Ok(first) = waiting.recv() {
        let more = waiting.try_iter().take(BATCH - 1);
        let batch: Vec<_> = std::iter::once(first).chain(more).collect();
        commit(disks, batch);
    }
}

/// Makes changes, and answers each request.
fn commit(disks: &Path, batch: Vec<Request>) {
    // All are written before the first is synced, so that one commit of the journal may serve all.
    let written: Vec<_> = batch
        .into_iter()
        .map(|request| (write(disks, &request), request))
        .collect();
    let mut renamed = Vec::new();
    for (file, request) in written {
        match file.and_then(|file| rename(disks, &request, file)) {
            Ok(()) => renamed.push(request),
            Err(error) => {
                // The error that is reported matters more than this one.
                let _ = fs::remove_file(temporary_path(disks, &request.id));
                answer(request, Err(error));
            }
        }
    }
    let synced = File::open(disks).and_then(|directory| directory.sync_all());
    for request in renamed {
        let result = match &synced {
            Ok(()) => Ok(()),
            Err(error) => Err(copy(error)),
        };
        answer(request, result);
    }
}

/// Writes the content of an entry under its temporary name.
fn write(disks: &Path, request: &Request) -> io::Result<Option<File>> {
    match &request.change {
        Change::Store(bytes) => {
            let mut file = create_regular(&temporary_path(disks, &request.id))?;
            file.write_all(bytes)?;
            Ok(Some(file))
        }
        Change::Mark => Ok(None),
    }
}

/// Gives an entry its name once its content is durable.
fn rename(disks: &Path, request: &Request, file: Option<File>) -> io::Result<()> {
    let (id, entry) = (&request.id, entry_path(disks, &request.id));
    match file {
        Some(file) => {
            file.sync_all()?;
            fs::rename(temporary_path(disks, id), entry)
        }
        None => match fs::rename(entry, mark_path(disks, id)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        },
    }
}

/// The same error of the system once more.
fn copy(error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(code) => io::Error::from_raw_os_error(code),
        None => error.kind().into(),
    }
}

fn answer(request: Request, result: io::Result<()>) {
    // A request that is no longer waited for needs no answer.
    let _ = request.done.send(result);
}
