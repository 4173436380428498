//! Seccomp: allows the system calls in the tables below, each with its reason, and no others.
//!
//! There is a filter for each [`Stage`]: opening and parsing, then serving. A call outside
//! the tables kills the process, because only injected code makes one. A killed daemon is restarted,
//! and its guest continues. A few calls that libraries can do without fail with ENOSYS.

use std::process;

use libc::{c_int, c_long};
use seccompiler::{BpfProgram, SeccompAction};

use super::{Error, Reach};
use crate::io::confine::Support;
use crate::io::confine::filter;
use crate::io::confine::seccomp::{Calls, Conditional, NOT_EXECUTABLE, THREAD, Test, install};

/// Calls that affect open files, memory and threads only.
const ALLOWED: &[c_long] = &[
    // A read: from the page cache, from storage, the driver's interrupt.
    libc::SYS_preadv2,
    libc::SYS_pread64,
    libc::SYS_read,      // a device state
    libc::SYS_write,     // eventfds, log lines
    libc::SYS_writev,    // log lines
    libc::SYS_getrusage, // page faults that waited for storage
    libc::SYS_fadvise64, // --readahead, --drop-cache
    // Waiting.
    libc::SYS_epoll_create1, // one for each queue that starts
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    libc::SYS_ppoll, // for a front-end to end
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    libc::SYS_eventfd2,        // to stop a queue
    libc::SYS_clock_nanosleep, // when out of descriptors
    libc::SYS_nanosleep,
    libc::SYS_restart_syscall, // a wait that SIGSTOP interrupted
    // A front-end: its connection, messages, descriptors and memory.
    libc::SYS_accept4,
    libc::SYS_pipe2, // reports the end of its thread
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    libc::SYS_close,
    libc::SYS_fstat, // sizes of shared files
    libc::SYS_newfstatat,
    libc::SYS_statx,        // kind of file system; owner of the socket's path
    libc::SYS_pidfd_open,   // whether the process of a front-end still runs
    libc::SYS_memfd_create, // an in-flight area
    libc::SYS_ftruncate,
    // Memory.
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    // Threads: one for each connection and queue.
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sched_getaffinity, // the C library, to size stacks and heaps
    libc::SYS_sched_yield,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // Signals: the request to stop, and SIGBUS of a truncated file.
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    // Clocks without a vDSO; seeds of hash tables.
    libc::SYS_clock_gettime,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
];

/// To read through rings that exist. Neither `io_uring_setup` nor `io_uring_register` is allowed
/// in any stage: their arguments are in memory, where no filter can check them.
const RINGS: &[c_long] = &[libc::SYS_io_uring_enter];

/// To wait for a layer that another process seals, and to measure it.
const PARSING: &[c_long] = &[libc::SYS_flock, libc::SYS_lseek];

/// To tighten the sandbox.
const TIGHTENING: &[c_long] = &[libc::SYS_capset, libc::SYS_seccomp];

/// To bind a socket once the image is open. Landlock keeps this to the socket's directory.
const LISTENING: &[c_long] = &[
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_umask,
    libc::SYS_flock, // one daemon at a time examines the path
    // The socket is renamed to its path once it listens.
    #[cfg(target_arch = "x86_64")]
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
];

/// To remove the socket at the end. Landlock keeps this to the socket's directory.
const REMOVING: &[c_long] = &[
    #[cfg(target_arch = "x86_64")]
    libc::SYS_unlink,
    libc::SYS_unlinkat,
];

/// To write to open files durably.
const WRITING: &[c_long] = &[
    libc::SYS_pwritev, // a guest's data
    libc::SYS_pwrite64,
    libc::SYS_fallocate,       // discards
    libc::SYS_sync_file_range, // large writes
    libc::SYS_lseek,           // length of the data file
    libc::SYS_fdatasync,
    libc::SYS_fsync,
];

/// To open the files of a writable layer for reading. Landlock keeps this to its directories.
const READING: &[c_long] = &[libc::SYS_openat];

/// To open and replace the files of a writable layer. Landlock keeps this to its directories.
const OPENING: &[c_long] = &[
    libc::SYS_openat,
    libc::SYS_flock,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_link,
    libc::SYS_linkat,
];

/// Calls that libraries can do without. They fail with ENOSYS.
const ABSENT: &[c_long] = &[
    // Its flags are in memory, where no filter can read them; C libraries fall back to `clone`.
    libc::SYS_clone3,
    // Old C libraries count processors by a file; a panic's backtrace looks for symbols.
    libc::SYS_openat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_open,
    libc::SYS_readlinkat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
    libc::SYS_getcwd,
];

const NEW_NAMESPACES: c_int = libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET;

/// Calls allowed for one argument only, counted from 0, to draw a progress bar on a terminal.
fn conditional_for_progress() -> [Conditional; 2] {
    [libc::TCGETS, libc::TIOCGWINSZ].map(|request| (libc::SYS_ioctl, 1, Test::Is(request as c_int)))
}

/// Calls allowed for one argument only, counted from 0, while the process opens and parses.
fn conditional_while_opening() -> [Conditional; 2] {
    [
        (libc::SYS_prlimit64, 0, Test::Is(0)), // to raise the limit of open files, of this process
        (libc::SYS_prctl, 0, Test::Is(libc::PR_SET_NO_NEW_PRIVS)), // set already, to tighten
    ]
}

/// Calls allowed for one argument only, counted from 0; several rows of a call are alternatives.
fn conditional() -> [Conditional; 20] {
    use Test::{Bits, Is, Null};
    let thread = Bits {
        mask: THREAD | NEW_NAMESPACES,
        set: THREAD,
    };
    [
        (libc::SYS_clone, 0, thread),
        (libc::SYS_prctl, 0, Is(libc::PR_SET_NAME)), // a thread's name
        (libc::SYS_sched_setaffinity, 0, Is(0)),     // --cpus, of the calling thread
        (libc::SYS_mmap, 2, NOT_EXECUTABLE),         // guest memory, stacks, heaps
        (libc::SYS_mprotect, 2, NOT_EXECUTABLE),     // guard pages, heaps
        (libc::SYS_ioctl, 1, Is(libc::FIONBIO as c_int)), // eventfds and connections
        (libc::SYS_ioctl, 1, Is(libc::FIONREAD as c_int)), // a device state: whether it is empty
        (libc::SYS_fcntl, 1, Is(libc::F_DUPFD_CLOEXEC)), // a connection's second handle
        (libc::SYS_fcntl, 1, Is(libc::F_GETFL)),
        (libc::SYS_fcntl, 1, Is(libc::F_SETFL)),
        (libc::SYS_fcntl, 1, Is(libc::F_GETFD)),
        (libc::SYS_fcntl, 1, Is(libc::F_ADD_SEALS)), // an in-flight area
        (libc::SYS_fcntl, 1, Is(libc::F_GET_SEALS)), // whether memory to map is shared memory
        (libc::SYS_getsockopt, 2, Is(libc::SO_PEERCRED)), // the process of a front-end
        (libc::SYS_getsockopt, 2, Is(libc::SO_DOMAIN)), // the kind of a socket that a front-end passes
        (libc::SYS_getsockopt, 2, Is(libc::SO_TYPE)),
        (libc::SYS_setsockopt, 2, Is(libc::SO_SNDTIMEO)), // a front-end that does not read
        (libc::SYS_setsockopt, 2, Is(libc::SO_RCVTIMEO)), // a control client that sends nothing
        (libc::SYS_sendto, 4, Null),                      // to a connected peer
        (libc::SYS_tgkill, 0, Is(process::id() as c_int)), // abort; a call that a front-end blocks
    ]
}

/// Stage of a confined process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Files are open, and not parsed yet.
    Opening,
    /// All files are parsed; the socket of a daemon listens.
    Serving,
}

/// What a process does beside reading open files.
#[derive(Clone, Copy, Debug, Default)]
pub struct Needs {
    /// It binds and removes sockets.
    pub sockets: bool,
    /// It writes to open files.
    pub write: bool,
    /// It opens files for reading while it parses.
    pub read: bool,
    /// It opens the files of a writable layer at its start.
    pub open: bool,
    /// It opens and replaces files while it serves.
    pub open_later: bool,
    /// It draws a progress bar.
    pub progress: bool,
    /// It reads through rings.
    pub rings: bool,
}

impl Needs {
    /// The needs of a process that reaches `reach`, by open files and rings and, where Landlock limits
    /// it to that, by opening more files while it serves.
    pub fn of(reach: &Reach<'_>, landlock: Support) -> Self {
        let opens = !reach.directories.is_empty();
        Self {
            sockets: !reach.sockets.is_empty(),
            write: reach.write || opens,
            read: !reach.readable.is_empty(),
            open: opens,
            open_later: opens && landlock == Support::Full,
            progress: reach.progress,
            rings: reach.rings,
        }
    }

    /// The tables of a stage.
    fn tables(self, stage: Stage) -> Vec<&'static [c_long]> {
        let opening = stage == Stage::Opening;
        let opens = if opening { self.open } else { self.open_later };
        let tables = [
            (true, ALLOWED),
            (self.rings, RINGS),
            (self.write, WRITING),
            (opening && self.read, READING),
            (opens, OPENING),
            (opens || self.sockets, REMOVING),
            (opening && self.sockets, LISTENING),
            (opening, PARSING),
            (opening, TIGHTENING),
        ];
        let needed = tables.into_iter().filter(|(needed, _)| *needed);
        needed.map(|(_, table)| table).collect()
    }
}

/// Restricts all threads, present and future, to the tables above. The filter of a stage is put
/// on top of that of the stage before: the kernel obeys the strictest.
///
/// # Errors
///
/// The kernel has seccomp and refuses the filter.
pub fn restrict(stage: Stage, needs: Needs) -> Result<Support, Error> {
    match filter(stage, needs, SeccompAction::KillProcess) {
        Some(filter) => Ok(install(&filter)?),
        None => Ok(Support::Missing),
    }
}

/// Compiles the filter of a stage; a call outside the tables meets `forbidden`. `None` if there is no filter for this
/// processor.
pub fn filter(stage: Stage, needs: Needs, forbidden: SeccompAction) -> Option<BpfProgram> {
    let mut conditional: Vec<_> = conditional().into();
    if stage == Stage::Opening {
        conditional.extend(conditional_while_opening());
    }
    if needs.progress {
        conditional.extend(conditional_for_progress());
    }
    let calls = Calls {
        allowed: needs.tables(stage).concat(),
        conditional,
        absent: ABSENT,
        forbidden,
    };
    filter::compile(&calls)
}
