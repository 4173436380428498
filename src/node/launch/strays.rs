//! Disk processes that a killed node left: of disks without a state entry, or started after the entry was written.
//!
//! A process may not listen on its control socket yet, or still be the node's program on its way to `ovbd-vhost`. So
//! processes are found by their arguments, which name the control socket.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use super::super::error::Error;
use super::super::id::DiskId;
use super::super::process::Process;
use super::{LAUNCH, Launcher};

/// What follows the id in the names of files in the run directory.
const ENDINGS: [&str; 6] = [".sock", ".control", ".log", ".notify", ".stats", ".new"];

impl Launcher {
    /// Ends the processes in the run directory whose disks are not among `known`, and removes their files: their node
    /// was killed before it made their entries durable.
    ///
    /// # Errors
    /// [`Error::File`] if the directory cannot be listed.
    pub async fn end_strays(&self, known: &[DiskId]) -> Result<(), Error> {
        for (id, pid) in self.processes() {
            if !known.contains(&id) {
                log::warn!("disk {id} has a process but no state entry; ending the process");
                self.end(pid).await;
            }
        }
        let list = fs::read_dir(&self.run_dir).map_err(Error::file("list", &self.run_dir))?;
        let names = list.flatten().map(|file| file.file_name());
        let ids: BTreeSet<_> = names.filter_map(|name| id_of(&name)).collect();
        for id in ids.into_iter().filter(|id| !known.contains(id)) {
            self.clean(&id, &self.socket(&id));
        }
        Ok(())
    }

    /// Ends the processes of disk `id`, if a killed node may have left some: the disk has files in the run directory.
    pub async fn end_stray(&self, id: &DiskId) {
        if !self.log(id).exists() && !self.notify(id).exists() {
            return;
        }
        for (_, pid) in self
            .processes()
            .into_iter()
            .filter(|(found, _)| found == id)
        {
            log::warn!("disk {id} has a process that no state entry names; ending the process");
            self.end(pid).await;
        }
    }

    async fn end(&self, pid: i32) {
        // A process that cannot be held has ended meanwhile.
        if let Ok(process) = Process::of_pid(&self.watcher, pid) {
            process.stop(Duration::ZERO).await;
        }
    }

    /// All processes of disks with their control sockets in the run directory.
    fn processes(&self) -> Vec<(DiskId, i32)> {
        let list = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = list.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        pids.filter_map(|pid| Some((self.disk_of(pid)?, pid)))
            .collect()
    }

    /// The disk of a process, if it is a disk process of this run directory.
    fn disk_of(&self, pid: i32) -> Option<DiskId> {
        let exe = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
        let node = fs::read_link("/proc/self/exe").ok();
        // A program that was replaced since has an ending.
        let exe = exe.as_os_str().as_bytes();
        let exe = exe.strip_suffix(b" (deleted)").unwrap_or(exe);
        let exe = Some(Path::new(OsStr::from_bytes(exe)));
        let text = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let mut arguments = text.split(|byte| *byte == 0).skip(1);
        let launched = exe == node.as_deref() && arguments.next() == Some(LAUNCH.as_bytes());
        if exe != Some(&self.program) && !launched {
            return None;
        }
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
