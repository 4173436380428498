//! The processes that fetch for the disks of a cache, by their names in the list of processes.

use std::fs;
use std::path::Path;

use rustix::process::Pid;

/// What a process does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Starts fetchers.
    Keeper,
    /// Takes the keeper's place.
    Standby,
    /// Fetches.
    Fetcher,
}

impl Role {
    /// The role that a process name, of which the system keeps 15 bytes, stands for.
    pub fn named(name: &str) -> Option<Self> {
        match name.trim_end() {
            "ovbd-fetch-keep" => Some(Self::Keeper),
            "ovbd-fetch-stan" => Some(Self::Standby),
            "ovbd-fetcher" => Some(Self::Fetcher),
            _ => None,
        }
    }

    /// The role of a running process.
    pub fn of(pid: Pid) -> Option<Self> {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
        Self::named(&name)
    }
}

/// The processes of all fetchers of this cache, in the order of their roles.
pub fn of_cache(cache: &Path) -> Vec<(Role, Pid)> {
    let processes = fs::read_dir("/proc").expect("processes").flatten();
    let found = processes.filter_map(|entry| {
        let pid = Pid::from_raw(entry.file_name().to_str()?.parse().ok()?)?;
        // A process that ended has none.
        let arguments = fs::read(entry.path().join("cmdline")).ok()?;
        let argument = arguments.split(|byte| *byte == 0).nth(1)?;
        let is_ours = argument == cache.as_os_str().as_encoded_bytes();
        is_ours.then(|| Some((Role::of(pid)?, pid))).flatten()
    });
    let mut found: Vec<_> = found.collect();
    found.sort_by_key(|(role, pid)| (*role, pid.as_raw_nonzero()));
    found
}

/// The children of a process in this role.
pub fn children(parent: Pid, role: Role) -> Vec<Pid> {
    let threads = fs::read_dir(format!("/proc/{parent}/task"));
    let threads = threads.into_iter().flatten().flatten();
    let children =
        threads.filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
    let children: Vec<_> = children.collect();
    let children = children.iter().flat_map(|text| text.split_whitespace());
    children
        .filter_map(|pid| Pid::from_raw(pid.parse().ok()?))
        .filter(|pid| Role::of(*pid) == Some(role))
        .collect()
}
