//! Compares the limits of the system with the needs of all queues, before the daemon is ready.
//!
//! A shortage that is found when a queue starts leaves a guest without its disk. A shortage that is found
//! before is one line for the administrator.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::process::{Resource, Rlimit, geteuid, getrlimit, setrlimit};

use crate::io::sigbus::free_ranges;
use crate::vhost::handler::MEMORY_SLOTS;

/// Descriptors of a queue: the front-end's three, the event that stops it, what it waits with, and
/// with a writable layer the event of its background thread.
const QUEUE_DESCRIPTORS: u64 = 5;

/// Descriptors beside those of queues: connections that say nothing yet, the descriptors of one
/// message, the connection and its areas, control connections, files that a flush or a snapshot
/// replaces.
const OTHER_DESCRIPTORS: u64 = 96;

/// Threads beside those of queues: connections, of front-ends and for control, and the last flush.
const OTHER_THREADS: u64 = 16;

/// Mappings of a thread: stack, guard page, signal stack and its guard.
const THREAD_MAPPINGS: u64 = 4;

/// Mappings beside those of threads and of what is open: guest memory, heaps.
const OTHER_MAPPINGS: u64 = 1200;

/// Ranges of memory protected from SIGBUS that front-ends need: one maps its memory while another leaves,
/// and each has an in-flight area and a dirty log.
const FRONT_END_RANGES: usize = 2 * (MEMORY_SLOTS + 2);

/// A limit that is too small.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Shortage {
    /// All queues together would exceed a limit of the system.
    #[error(
        "{queues} queues need {need} {what}, and {limit} allows {have}: raise the limit, or serve fewer \
         queues with --num-queues"
    )]
    Queues {
        /// Name of the resource.
        what: &'static str,
        /// Name of the limit.
        limit: String,
        /// Number of queues.
        queues: u16,
        /// Amount that the queues need.
        need: u64,
        /// Amount that the limit allows.
        have: u64,
    },
    /// The mapped layers leave too few ranges for the memory of guests.
    #[error(
        "front-ends need {need} mappings in the table of mappings protected from SIGBUS, and the layers \
         leave {have}: make one layer of several with `ovbd merge`"
    )]
    Ranges {
        /// Ranges that front-ends need.
        need: usize,
        /// Ranges that are free.
        have: usize,
    },
}

/// Limits of the system, as far as they can be read outside of the sandbox only.
#[derive(Debug)]
pub struct Room {
    /// Threads that may still be started, each with the name of its limit.
    threads: Vec<(u64, String)>,
    /// Mappings that may still be made. `None`: unknown.
    mappings: Option<u64>,
}

impl Room {
    /// Reads what is left of each limit. A limit that cannot be read counts as unlimited.
    pub fn measure() -> Self {
        let mut threads: Vec<_> = user_threads().into_iter().collect();
        threads.extend(cgroup_threads(
            Path::new("/proc/self/cgroup"),
            Path::new("/sys/fs/cgroup"),
        ));
        let number = |path: &str| fs::read_to_string(path).ok()?.trim().parse().ok();
        let most: Option<u64> = number("/proc/sys/vm/max_map_count");
        let maps = fs::read_to_string("/proc/self/maps").ok();
        let maps = maps.map_or(0, |maps| maps.lines().count() as u64);
        Self {
            threads,
            mappings: most.map(|most| most.saturating_sub(maps)),
        }
    }

    /// Compares what is left with what `queues` queues need, and raises the soft limit of open files
    /// if that is enough. Call it when all files are open.
    ///
    /// # Errors
    ///
    /// The first limit that would be exceeded.
    pub fn check(&self, queues: u16, writable: bool) -> Result<(), Shortage> {
        check_ranges(free_ranges())?;
        let shortage = |what, limit: &str, need, have| Shortage::Queues {
            what,
            limit: limit.to_owned(),
            queues,
            need,
            have,
        };
        let each = 1 + u64::from(writable);
        let threads = u64::from(queues) * each + OTHER_THREADS;
        for (have, limit) in &self.threads {
            if *have < threads {
                return Err(shortage("more threads", limit, threads, *have));
            }
        }
        let mappings = threads * THREAD_MAPPINGS + OTHER_MAPPINGS;
        if let Some(have) = self.mappings.filter(|have| *have < mappings) {
            let limit = "vm.max_map_count";
            return Err(shortage("more mappings of memory", limit, mappings, have));
        }
        let each = QUEUE_DESCRIPTORS + u64::from(writable);
        let need = open_descriptors() + u64::from(queues) * each + OTHER_DESCRIPTORS;
        raise_descriptors(need)
            .map_err(|have| shortage("open files", "RLIMIT_NOFILE (ulimit -n)", need, have))
    }
}

/// Compares the ranges that the mapped layers leave with the needs of front-ends.
fn check_ranges(have: usize) -> Result<(), Shortage> {
    match have < FRONT_END_RANGES {
        true => Err(Shortage::Ranges {
            need: FRONT_END_RANGES,
            have,
        }),
        false => Ok(()),
    }
}

/// Number of open descriptors: a new one gets the lowest number that is free.
fn open_descriptors() -> u64 {
    // A process with none left has as many as it may.
    io::pipe().map_or(u64::MAX / 2, |(read, _write)| {
        u64::from(read.as_raw_fd().unsigned_abs())
    })
}

/// Raises the soft limit of open files to `need`, or returns the limit that prevents it.
fn raise_descriptors(need: u64) -> Result<(), u64> {
    let limit = getrlimit(Resource::Nofile);
    let Some(current) = limit.current.filter(|current| *current < need) else {
        return Ok(());
    };
    let most = limit.maximum.unwrap_or(u64::MAX);
    if most < need {
        return Err(most);
    }
    let raised = Rlimit {
        current: Some(need),
        ..limit
    };
    setrlimit(Resource::Nofile, raised).map_err(|_| current)
}

/// Threads that the user of the process may still start.
fn user_threads() -> Option<(u64, String)> {
    /// From here on, counting all processes of the host would cost more than it tells.
    const PLENTY: u64 = 8192;
    // The kernel does not count those of root.
    let most = getrlimit(Resource::Nproc).current?;
    let user = geteuid();
    if user.is_root() || most >= PLENTY {
        return None;
    }
    let processes = fs::read_dir("/proc").ok().into_iter().flatten().flatten();
    let count = processes
        .filter_map(|process| {
            let status = fs::read_to_string(process.path().join("status")).ok()?;
            let field = |name| {
                status
                    .lines()
                    .find_map(|line: &str| line.strip_prefix(name))
            };
            let real: u32 = field("Uid:")?.split_whitespace().next()?.parse().ok()?;
            let threads: u64 = field("Threads:")?.trim().parse().ok()?;
            (real == user.as_raw()).then_some(threads)
        })
        .sum();
    let name = "RLIMIT_NPROC (ulimit -u)".to_owned();
    Some((most.saturating_sub(count), name))
}

/// Threads that each control group of the process may still start. `membership` names the groups.
fn cgroup_threads(membership: &Path, root: &Path) -> Vec<(u64, String)> {
    let text = fs::read_to_string(membership).unwrap_or_default();
    let groups = text.lines().filter_map(|line| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        let base = match controllers {
            "" => root.to_owned(),
            _ if controllers.split(',').any(|name| name == "pids") => root.join("pids"),
            _ => return None,
        };
        Some((base, PathBuf::from(path.trim_start_matches('/'))))
    });
    let mut found = Vec::new();
    for (base, path) in groups {
        for group in path.ancestors().map(|path| base.join(path)) {
            let number = |name| {
                let text = fs::read_to_string(group.join(name)).ok()?;
                text.trim().parse::<u64>().ok() // not "max"
            };
            if let (Some(most), Some(now)) = (number("pids.max"), number("pids.current")) {
                let name = format!("pids.max (TasksMax) of {}", group.display());
                found.push((most.saturating_sub(now), name));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_of_all_control_groups_above_count() {
        let folder = tempfile::tempdir().unwrap();
        let (membership, root) = (folder.path().join("cgroup"), folder.path().join("fs"));
        let group = root.join("a/b");
        fs::create_dir_all(&group).unwrap();
        fs::write(&membership, "1:name=x:/other\n0::/a/b\n").unwrap();
        for (group, most, now) in [("a/b", "max", "7"), ("a", "20", "9")] {
            fs::write(root.join(group).join("pids.max"), most).unwrap();
            fs::write(root.join(group).join("pids.current"), now).unwrap();
        }
        let threads = cgroup_threads(&membership, &root);
        assert_eq!(threads.len(), 1);
        assert_eq!(threads[0].0, 11);
        let room = Room {
            threads,
            mappings: None,
        };
        let error = room.check(4, false).unwrap_err().to_string();
        assert!(error.contains("4 queues need 20 more threads"), "{error}");
        assert!(error.contains("fs/a allows 11"), "{error}");
    }

    #[test]
    fn layers_leave_ranges_for_front_ends() {
        assert_eq!(check_ranges(free_ranges()), Ok(()));
        let error = check_ranges(FRONT_END_RANGES - 1).unwrap_err().to_string();
        assert!(error.contains("need 1022 mappings"), "{error}");
        assert!(error.contains("leave 1021"), "{error}");
    }

    #[test]
    fn a_small_map_count_is_a_shortage_and_what_is_unknown_is_none() {
        let room = |mappings| Room {
            threads: Vec::new(),
            mappings,
        };
        assert_eq!(room(None).check(1, true), Ok(()));
        let error = room(Some(100)).check(1, true).unwrap_err().to_string();
        assert!(error.contains("vm.max_map_count allows 100"), "{error}");
    }
}
