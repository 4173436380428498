//! Compares the limits of the system with the needs of all queues, before the daemon is ready.
//!
//! A shortage found when a queue starts leaves a guest without its disk. A shortage found at the start of the daemon
//! is one line for the administrator.

mod memory;

use std::fs::{self, File};
use std::io;
use std::iter;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::process::{Resource, geteuid, getrlimit};

use memory::Usage;

use crate::io::rlimit;
use crate::io::sigbus::free_ranges;
use crate::vhost::closing::{MAX_CLOSERS, MAX_CLOSING};
use crate::vhost::handler::MEMORY_SLOTS;
use crate::vhost::message::MAX_HELD;

/// Most connections with a thread, including one that is ending. The oldest without the disk is closed for a new one.
/// The limits of the system may allow fewer.
const MAX_FRONT_ENDS: usize = 17;

/// Descriptors of a queue that its front-end sends: kick, call and error.
const SENT_DESCRIPTORS: u64 = 3;

/// Descriptors of a queue worker: the event that stops it, its poller, and the event of fetched bytes. With a
/// writable layer there is one more: the event of its background thread.
const WORKER_DESCRIPTORS: u64 = 3;

/// Descriptors of a front-end beside those of its queues: the connection, its process, both ends of the pipe
/// that reports the end of its thread, the socket for messages to it, a device state, the event of its log, and
/// those of a message.
const FRONT_END_DESCRIPTORS: u64 = 9 + MAX_HELD as u64;

/// Descriptors beside those of front-ends: connections that have sent nothing yet or wait for another to end,
/// control connections, files that a flush or a snapshot replaces or adds, and files that are being closed after
/// their front-end has left.
const OTHER_DESCRIPTORS: u64 = 96 + MAX_CLOSING as u64;

/// Front-ends that have to fit: the one that has the disk, and the next one.
const LEAST_FRONT_ENDS: u64 = 2;

/// Threads beside those of queues: one for each front-end, those that close files, control connections, the
/// last flush, and the one that writes image tables.
const OTHER_THREADS: u64 = (MAX_FRONT_ENDS + MAX_CLOSERS) as u64 + 13;

/// Mappings of a thread: stack, guard page, signal stack and its guard.
const THREAD_MAPPINGS: u64 = 4;

/// Mappings beside those of threads and of what is open: guest memory, heaps.
const OTHER_MAPPINGS: u64 = 1200;

/// Ranges of memory protected from SIGBUS that a front-end needs: its memory, an in-flight area and a dirty
/// log.
const FRONT_END_RANGES: usize = MEMORY_SLOTS + 2;

pub use memory::check_stack;

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
        "too many mapped layers: front-ends need {need} entries of the SIGBUS table, {have} are free; \
         merge layers with `ovbd merge`"
    )]
    Ranges {
        /// Ranges that front-ends need.
        need: usize,
        /// Ranges that are free.
        have: usize,
    },
    /// The main thread may not have the stack that it needs.
    #[error(
        "the main thread needs {need} bytes of stack, and RLIMIT_STACK (ulimit -s) allows {have}: raise the \
         limit"
    )]
    Stack {
        /// Bytes that the thread needs.
        need: u64,
        /// Bytes that the limit allows.
        have: u64,
    },
}

/// What the limits of the system leave, as far as that can be read outside of the sandbox only.
#[derive(Debug)]
pub struct SystemLimits {
    /// Threads that may still be started, each with the name of its limit.
    threads: Vec<(u64, String)>,
    /// Mappings that may still be made. `None`: unknown.
    mappings: Option<u64>,
    memory: Usage,
    /// `/proc/self/fd`. `None`: unknown.
    descriptors: Option<File>,
}

impl SystemLimits {
    /// Reads the limits and the present use. A limit that cannot be read counts as unlimited.
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
            memory: Usage::open(),
            descriptors: File::open("/proc/self/fd").ok(),
        }
    }

    /// Returns the number of open descriptors.
    fn open_descriptors(&self) -> u64 {
        let listed = self
            .descriptors
            .as_ref()
            .and_then(|list| list.metadata().ok());
        // From Linux 6.2 on, the size of the directory is their number.
        match listed.map_or(0, |list| list.len()) {
            0 => count_descriptors(),
            number => number,
        }
    }

    /// Compares the limits of memory with the needs of `queues` queues. Call it also before the layers are read:
    /// a failed allocation ends the process.
    ///
    /// # Errors
    ///
    /// The first limit that would be exceeded.
    pub fn check_memory(&self, queues: u16, writable: bool) -> Result<(), Shortage> {
        self.memory.check(queues, threads(queues, writable))
    }

    /// Compares what is left with the needs of `queues` queues, and raises the soft limits as far as
    /// needed. Call it when all files are open. Returns the number of front-ends that may be connected.
    ///
    /// # Errors
    ///
    /// The first limit that would be exceeded.
    pub fn check(&self, queues: u16, writable: bool) -> Result<usize, Shortage> {
        let free_ranges = free_ranges();
        check_ranges(free_ranges)?;
        self.check_memory(queues, writable)?;
        let shortage = |what, limit: &str, need, have| Shortage::Queues {
            what,
            limit: limit.to_owned(),
            queues,
            need,
            have,
        };
        let threads = threads(queues, writable);
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
        let descriptors = Descriptors::of(self.open_descriptors(), queues, writable);
        let most = descriptors.need(MAX_FRONT_ENDS as u64);
        let need = descriptors.need(LEAST_FRONT_ENDS);
        let have = rlimit::raise(Resource::Nofile, most);
        if have < need {
            let limit = "RLIMIT_NOFILE (ulimit -n)";
            return Err(shortage("open files", limit, need, have));
        }
        let front_ends = descriptors.front_ends(have);
        Ok(front_ends.min(free_ranges / FRONT_END_RANGES))
    }
}

/// Returns the number of threads for `queues` queues, and of all others.
fn threads(queues: u16, writable: bool) -> u64 {
    u64::from(queues) * (1 + u64::from(writable)) + OTHER_THREADS
}

/// Descriptors that front-ends need. Each front-end may have all queues; the queues of one front-end run.
#[derive(Debug)]
struct Descriptors {
    /// Number that does not depend on the number of front-ends.
    shared: u64,
    /// Number for one front-end.
    each: u64,
}

impl Descriptors {
    /// Counts the descriptors for `queues` queues, above the `open` ones.
    fn of(open: u64, queues: u16, writable: bool) -> Self {
        let worker = WORKER_DESCRIPTORS + u64::from(writable);
        let queues = u64::from(queues);
        Self {
            shared: open + queues * worker + OTHER_DESCRIPTORS,
            each: queues * SENT_DESCRIPTORS + FRONT_END_DESCRIPTORS,
        }
    }

    /// Returns the number of descriptors for `front_ends` front-ends.
    fn need(&self, front_ends: u64) -> u64 {
        self.shared + front_ends * self.each
    }

    /// Returns the number of front-ends for which `have` descriptors are enough.
    fn front_ends(&self, have: u64) -> usize {
        let fit = have.saturating_sub(self.shared) / self.each;
        usize::try_from(fit).map_or(MAX_FRONT_ENDS, |fit| fit.min(MAX_FRONT_ENDS))
    }
}

/// Compares the ranges that the mapped layers leave with the needs of front-ends.
fn check_ranges(have: usize) -> Result<(), Shortage> {
    let need = LEAST_FRONT_ENDS as usize * FRONT_END_RANGES;
    match have < need {
        true => Err(Shortage::Ranges { need, have }),
        false => Ok(()),
    }
}

/// Counts the open descriptors. A new descriptor gets the lowest free number. So many new ones fill the
/// gaps, and the number of the last one shows how many are open.
fn count_descriptors() -> u64 {
    /// Gaps that are filled.
    const GAPS: usize = 128;
    let Ok((read, _write)) = io::pipe() else {
        // No descriptor is left: the limit is reached.
        return u64::MAX / 2;
    };
    let copies: Vec<_> = iter::repeat_with(|| read.try_clone())
        .take(GAPS)
        .map_while(Result::ok)
        .collect();
    let last = copies.last().unwrap_or(&read);
    let all = u64::from(last.as_raw_fd().unsigned_abs()) + 1;
    all.saturating_sub(copies.len() as u64 + 2)
}

/// Threads that the user of the process may still start.
fn user_threads() -> Option<(u64, String)> {
    /// At this limit and above, counting all processes of the host is not worth its time.
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
        let limits = SystemLimits {
            threads,
            mappings: None,
            memory: Usage::open(),
            descriptors: None,
        };
        let error = limits.check(4, false).unwrap_err().to_string();
        assert!(error.contains("4 queues need 42 more threads"), "{error}");
        assert!(error.contains("fs/a allows 11"), "{error}");
    }

    #[test]
    fn layers_leave_ranges_for_front_ends() {
        assert_eq!(check_ranges(free_ranges()), Ok(()));
        let error = check_ranges(2 * FRONT_END_RANGES - 1)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("need 1022 entries of the SIGBUS table"),
            "{error}"
        );
        assert!(error.contains("1021 are free"), "{error}");
    }

    /// Front-ends that have left may each have passed files whose `close(2)` waits.
    #[test]
    fn files_that_are_being_closed_count() {
        let descriptors = Descriptors::of(10, 4, true);
        let least = 10 + 4 * 4 + (MAX_CLOSERS * MAX_HELD) as u64;
        assert!(descriptors.shared > least, "{descriptors:?}");
    }

    #[test]
    fn as_many_front_ends_as_have_descriptors() {
        let descriptors = Descriptors {
            shared: 100,
            each: 10,
        };
        let expected = [(119, 1), (120, 2), (129, 2), (u64::MAX, MAX_FRONT_ENDS)];
        for (have, front_ends) in expected {
            assert_eq!(descriptors.front_ends(have), front_ends, "{have}");
        }
    }

    #[test]
    fn a_small_map_count_is_a_shortage_and_what_is_unknown_is_none() {
        let limits = |mappings| SystemLimits {
            threads: Vec::new(),
            mappings,
            memory: Usage::open(),
            descriptors: None,
        };
        assert!(limits(None).check(1, true).is_ok());
        let error = limits(Some(100)).check(1, true).unwrap_err().to_string();
        assert!(error.contains("vm.max_map_count allows 100"), "{error}");
    }

    #[test]
    fn both_ways_count_open_descriptors() {
        let limits = SystemLimits::measure();
        let held: Vec<_> = (0..50).map(|_| io::pipe().unwrap()).collect();
        // Other tests of this process have files open too.
        assert!(limits.open_descriptors() >= 100);
        assert!(count_descriptors() >= 100);
        drop(held);
    }
}
