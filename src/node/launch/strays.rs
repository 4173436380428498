//! Disk processes that a killed node left: of disks without a state entry, or started after the entry was written.
//!
//! A process may not listen on its control socket yet. So processes are found by their arguments, which name the socket.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use super::super::error::Error;
use super::super::id::DiskId;
use super::super::process::Process;
use super::Launcher;

/// What follows the id in the names of files in the run directory.
const ENDINGS: [&str; 6] = [".sock", ".control", ".log", ".log.1", ".stats", ".new"];

/// The disk processes of a run directory.
pub type Processes = BTreeMap<DiskId, Vec<i32>>;

impl Launcher {
    /// Ends the processes in the run directory whose disks are not among `known`, and removes their files: their node
    /// was killed before it made their entries durable. Returns the other processes.
    ///
    /// # Errors
    /// [`Error::File`] if the directory cannot be listed.
    pub async fn end_strays(&self, known: &BTreeSet<DiskId>) -> Result<Processes, Error> {
        let mut processes = self.processes();
        for (id, pids) in &processes {
            if !known.contains(id) {
                self.end_all(id, pids).await;
            }
        }
        processes.retain(|id, _| known.contains(id));
        let list = fs::read_dir(&self.run_dir).map_err(Error::file("list", &self.run_dir))?;
        let names = list.flatten().map(|file| file.file_name());
        let ids: BTreeSet<_> = names.filter_map(|name| id_of(&name)).collect();
        for id in ids.difference(known) {
            self.clean(id, &self.socket(id));
        }
        Ok(processes)
    }

    /// Ends the processes of a disk whose state entry cannot be read.
    pub async fn end_unknown(&self, id: &DiskId) {
        if let Some(pids) = self.processes().get(id) {
            self.end_all(id, pids).await;
        }
    }

    /// Ends processes of disk `id`.
    pub async fn end_all(&self, id: &DiskId, pids: &[i32]) {
        for pid in pids {
            log::warn!("process {pid} of disk {id} is not in a state entry; ending the process");
            // A process that cannot be held has ended meanwhile.
            if let Ok(process) = Process::of_pid(&self.watcher, *pid) {
                process.stop(Duration::ZERO).await;
            }
        }
    }

    /// Returns all processes of disks with their control sockets in the run directory. Reads the list of processes of the
    /// host.
    pub fn processes(&self) -> Processes {
        let list = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = list.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let mut found = Processes::new();
        for pid in pids {
            if let Some(id) = self.disk_of(pid) {
                found.entry(id).or_default().push(pid);
            }
        }
        found
    }

    /// The disk of a process, if it is a disk process of this run directory.
    pub(super) fn disk_of(&self, pid: i32) -> Option<DiskId> {
        let exe = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
        // A program that was replaced since has an ending.
        let exe = exe.as_os_str().as_bytes();
        let exe = exe.strip_suffix(b" (deleted)").unwrap_or(exe);
        if Path::new(OsStr::from_bytes(exe)) != self.program {
            return None;
        }
        let text = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let mut arguments = text.split(|byte| *byte == 0).skip(1);
        arguments.find(|argument| *argument == b"--control")?;
        let control = Path::new(OsStr::from_bytes(arguments.next()?));
        let name = control.file_name()?.to_str()?.strip_suffix(".control")?;
        (control.parent() == Some(&self.run_dir)).then_some(())?;
        name.parse().ok()
    }
}

/// The disk that a file in the run directory belongs to.
fn id_of(name: &OsStr) -> Option<DiskId> {
    let name = name.to_str()?;
    let ids = ENDINGS
        .iter()
        .filter_map(|ending| name.strip_suffix(ending));
    ids.into_iter().find_map(|id| id.parse().ok())
}
