//! The state directory: one file per disk, replaced atomically.
//!
//! An entry is written under a temporary name, synced and renamed, and the directory is synced. A crash at any point
//! leaves the old entry or the new one. A removal begins with another name of the entry, its mark. A file that cannot be
//! read affects its own disk only.

mod committer;

use std::fs::{self, File, TryLockError};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::entry::{Entry, VERSION};
use super::error::Error;
use super::id::DiskId;
use crate::io::directory::create_all;
use crate::io::file_lock::{LockKind, lock_within};
use crate::io::regular::{open_regular, open_to_read};
use committer::{Change, Committer, entry_path, mark_path};

/// Longest entry in bytes; layers are at most 4094 paths of 4096 bytes.
const MAX_ENTRY: u64 = 20 << 20;

/// How long another process may hold the lock: a disk process that a killed node was starting has it for a moment.
const LOCK_LIMIT: Duration = Duration::from_secs(1);

/// The state directory, locked for this node.
#[derive(Debug)]
pub struct StateDir {
    disks: PathBuf,
    committer: Committer,
    /// Held for the lock.
    _lock: File,
}

/// Content of a file of the state directory.
#[derive(Debug)]
pub enum StoredEntry {
    /// A valid entry.
    Valid(Box<Entry>),
    /// An entry that cannot be used, and the reason.
    Damaged(DiskId, String),
    /// The disk is being removed. The entry is absent if it was damaged.
    Removing(DiskId, Option<Box<Entry>>),
}

impl StoredEntry {
    /// Name of the disk.
    pub fn id(&self) -> &DiskId {
        match self {
            Self::Valid(entry) => &entry.id,
            Self::Damaged(id, _) | Self::Removing(id, _) => id,
        }
    }
}

impl StateDir {
    /// Opens the directory, creates it if missing, and locks it.
    ///
    /// # Errors
    /// [`Error::StateInUse`] if another node holds the lock; [`Error::File`] for failures of the system.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let disks = path.join("disks");
        create_all(path).map_err(Error::file("create", path))?;
        create_all(&disks).map_err(Error::file("create", &disks))?;
        let lock = path.join("lock");
        let mut options = File::options();
        options.write(true).create(true).truncate(false);
        let file = open_regular(&lock, options).map_err(Error::file("open", &lock))?;
        match lock_within(&file, LockKind::Exclusive, LOCK_LIMIT) {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(Error::StateInUse(path.to_owned())),
            Err(TryLockError::Error(error)) => return Err(Error::file("lock", &lock)(error)),
        }
        let committer = Committer::start(disks.clone()).map_err(Error::Runtime)?;
        Ok(Self {
            disks,
            committer,
            _lock: file,
        })
    }

    /// Reads all entries. Leftovers of interrupted writes are removed.
    ///
    /// # Errors
    /// [`Error::File`] if the directory cannot be listed.
    pub fn load(&self) -> Result<Vec<StoredEntry>, Error> {
        let list = fs::read_dir(&self.disks).map_err(Error::file("list", &self.disks))?;
        let mut found = Vec::new();
        for file in list {
            let file = file.map_err(Error::file("list", &self.disks))?;
            let name = file.file_name();
            let Some(name) = name.to_str() else { continue };
            if name.ends_with(".tmp") {
                // A leftover that stays is found again at the next start.
                let _ = fs::remove_file(file.path());
            } else if let Some(Ok(id)) = name.strip_suffix(".deleting").map(str::parse) {
                found.extend(self.removing(&file.path(), id));
            } else if let Some(Ok(id)) = name.strip_suffix(".json").map(str::parse::<DiskId>) {
                found.push(match read(&file.path(), &id) {
                    Ok(entry) => StoredEntry::Valid(Box::new(entry)),
                    Err(reason) => StoredEntry::Damaged(id, reason),
                });
            }
        }
        Ok(found)
    }

    /// Reads the mark of a removal. A disk that was made under the same name since has an entry: its removal ended, and the
    /// mark came back by a power failure.
    fn removing(&self, mark: &Path, id: DiskId) -> Option<StoredEntry> {
        if entry_path(&self.disks, &id).exists() {
            // A mark that stays is found again at the next start.
            let _ = fs::remove_file(mark);
            return None;
        }
        let entry = read(mark, &id).ok().map(Box::new);
        Some(StoredEntry::Removing(id, entry))
    }

    /// Makes `entry` durable under its name.
    ///
    /// # Errors
    /// [`Error::File`]; the former entry stays, unless the directory cannot be synced.
    pub async fn store(&self, entry: &Entry) -> Result<(), Error> {
        let path = entry_path(&self.disks, &entry.id);
        let bytes = serde_json::to_vec(entry).map_err(io::Error::other);
        let bytes = bytes.map_err(Error::file("encode", &path))?;
        let stored = self.committer.commit(&entry.id, Change::Store(bytes)).await;
        stored.map_err(Error::file("write", &path))
    }

    /// Replaces the entry of `id` by the mark of a removal, durably: a node that finds the mark removes the disk.
    ///
    /// # Errors
    /// [`Error::File`], also if the directory cannot be synced. A missing entry is not an error.
    pub async fn mark(&self, id: &DiskId) -> Result<(), Error> {
        let marked = self.committer.commit(id, Change::Mark).await;
        marked.map_err(Error::file("rename", &entry_path(&self.disks, id)))
    }

    /// Ends a removal. A mark that comes back after a power failure only repeats it.
    ///
    /// # Errors
    /// [`Error::File`]. A missing mark is not an error.
    pub fn remove_mark(&self, id: &DiskId) -> Result<(), Error> {
        remove(&mark_path(&self.disks, id))
    }

    /// Removes the entry of a disk that could not be made.
    ///
    /// # Errors
    /// [`Error::File`]. A missing entry is not an error.
    pub fn remove_entry(&self, id: &DiskId) -> Result<(), Error> {
        remove(&entry_path(&self.disks, id))
    }
}

fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::file("remove", path)(error))
        }
        _ => Ok(()),
    }
}

fn read(path: &Path, id: &DiskId) -> Result<Entry, String> {
    let mut text = Vec::new();
    let file = open_to_read(path).map_err(|error| error.to_string())?;
    file.take(MAX_ENTRY + 1)
        .read_to_end(&mut text)
        .map_err(|error| error.to_string())?;
    if text.len() as u64 > MAX_ENTRY {
        return Err(format!("state entry is longer than {MAX_ENTRY} bytes"));
    }
    let damaged = |error| format!("state entry is damaged: {error}; remove the disk");
    let value: Value = serde_json::from_slice(&text).map_err(damaged)?;
    if let Some(version) = value.get("version").filter(|version| **version != VERSION) {
        let text = format!("version {version}, expected {VERSION}");
        return Err(newer(&text));
    }
    let entry = serde_json::from_value::<Entry>(value);
    let entry = entry.map_err(|error| match error.to_string() {
        text if text.starts_with("unknown field") => newer(&text),
        _ => damaged(error),
    })?;
    match entry.id == *id {
        true => Ok(entry),
        false => Err(format!("state entry is that of disk {}", entry.id)),
    }
}

/// Why an entry of a newer node is not read, and what to do.
fn newer(what: &str) -> String {
    format!(
        "state entry was written by a newer ovbd-node ({what}); install that version again, or remove the disk"
    )
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::node::spec::{Content, DiskSpec};

    fn entry(id: &str) -> Entry {
        Entry {
            version: VERSION,
            id: id.parse().unwrap(),
            generation: 1,
            spec: DiskSpec::default(),
            content: Content::Layers(vec![PathBuf::from("/a")]),
            upper: None,
            socket: PathBuf::from("/run/a.sock"),
            process: None,
            created: 5,
        }
    }

    #[tokio::test]
    async fn entries_are_found_again_and_damage_stays_with_its_disk() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        assert!(matches!(
            StateDir::open(dir.path()),
            Err(Error::StateInUse(_))
        ));
        for id in [
            "good", "torn", "empty", "other", "newer", "going", "ill", "again",
        ] {
            state.store(&entry(id)).await.unwrap();
        }
        let path = |id: &str| dir.path().join(format!("disks/{id}.json"));
        let text = fs::read_to_string(path("torn")).unwrap();
        fs::write(path("torn"), &text[..text.len() / 2]).unwrap();
        fs::write(path("empty"), "").unwrap();
        fs::rename(path("other"), path("renamed")).unwrap();
        let newer = fs::read_to_string(path("newer"))
            .unwrap()
            .replace("\"version\":1", "\"version\":2");
        fs::write(path("newer"), newer).unwrap();
        fs::write(dir.path().join("disks/half.tmp"), "x").unwrap();
        fs::write(path(".hidden"), "x").unwrap();
        fs::write(path("ill"), "x").unwrap();
        for id in ["going", "ill", "again"] {
            state.mark(&id.parse().unwrap()).await.unwrap();
        }
        state.store(&entry("again")).await.unwrap();
        // Opening it would wait for a writer.
        let mode = rustix::fs::Mode::RWXU;
        rustix::fs::mkfifoat(rustix::fs::CWD, path("pipe"), mode).unwrap();
        let (mut good, mut bad, mut going) = (Vec::new(), Vec::new(), Vec::new());
        for loaded in state.load().unwrap() {
            match loaded {
                StoredEntry::Valid(entry) => good.push(entry.id.to_string()),
                StoredEntry::Damaged(id, _) => bad.push(id.to_string()),
                StoredEntry::Removing(id, entry) => going.push((id.to_string(), entry.is_some())),
            }
        }
        good.sort();
        bad.sort();
        going.sort();
        assert_eq!(good, ["again", "good"]);
        assert_eq!(
            going,
            [("going".to_owned(), true), ("ill".to_owned(), false)]
        );
        assert_eq!(bad, ["empty", "newer", "pipe", "renamed", "torn"]);
        assert!(!dir.path().join("disks/half.tmp").exists());
        let going: DiskId = "going".parse().unwrap();
        for _ in 0..2 {
            // What is gone already is no error.
            state.mark(&going).await.unwrap();
            state.remove_mark(&going).unwrap();
            state.remove_entry(&"good".parse().unwrap()).unwrap();
        }
        assert_eq!(state.load().unwrap().len(), 7);
    }
}
