//! The sandbox of the processes that talk to registries: network and cache, and little else.
//!
//! They parse data from the network (HTTP, TLS, DNS), and have neither guest memory nor layers' tables.
//! Landlock limits the files to the cache, the directories of credentials and the configuration of
//! name resolution, and forbids listening. seccomp forbids running programs, and all system calls that
//! fetching does not need. No capability is left. A forbidden call fails with EPERM: the C library's resolver
//! tries some that it can do without.
//!
//! Ports to connect to are not limited: a registry redirects to stores at ports of their own.

use std::io;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd,
    Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, Scope,
};
use libc::{c_int, c_long};
use rustix::thread::CapabilitySet;
use seccompiler::SeccompAction;
use thiserror::Error;

use crate::io::confine::seccomp::{Calls, NOT_EXECUTABLE, THREAD, Test, install};
use crate::io::confine::{self, Support, filter};
use crate::io::directory::parent_of;
use crate::io::name_service;

/// The newest set of rights to take away; an older kernel takes those it knows.
const NEWEST: ABI = ABI::V6;

/// Files and directories that the C library reads to resolve names.
const RESOLVER_FILES: [&str; 9] = [
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/nsswitch.conf",
    "/etc/host.conf",
    "/etc/gai.conf",
    "/etc/services",
    "/run/systemd/resolve",
    "/run/NetworkManager",
    "/run/resolvconf",
];

/// Allowed system calls.
const ALLOWED: &[c_long] = &[
    // Files of the cache; Landlock limits the paths.
    libc::SYS_openat,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_lseek,
    libc::SYS_close,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlinkat,
    libc::SYS_getdents64,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    libc::SYS_fchmod,
    libc::SYS_utimensat,
    libc::SYS_flock,
    libc::SYS_fcntl,
    libc::SYS_mkdirat,
    libc::SYS_unlinkat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_umask,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_open,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_stat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_lstat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_access,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_mkdir,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_rmdir,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_unlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_rename,
    // Connections to registries and disks.
    libc::SYS_connect,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    libc::SYS_setsockopt,
    libc::SYS_getsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_shutdown,
    // Waiting.
    libc::SYS_ppoll,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_pipe2,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_restart_syscall,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    // Memory.
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    // Threads and signals.
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    // System queries of libraries.
    libc::SYS_clock_gettime,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_uname,
    libc::SYS_sysinfo,
    libc::SYS_getcwd,
];

/// Calls that fail with ENOSYS: the flags of `clone3` lie in memory, where no filter can read them, and C
/// libraries fall back to `clone`.
const ABSENT: &[c_long] = &[libc::SYS_clone3];

/// Name of the sandbox in log lines.
const NAME: &str = "the fetcher's sandbox";

/// Address families of sockets: the resolver asks a name service and the kernel's routing tables.
const FAMILIES: [c_int; 4] = [
    libc::AF_INET,
    libc::AF_INET6,
    libc::AF_UNIX,
    libc::AF_NETLINK,
];

/// The sandbox cannot be entered.
#[derive(Debug, Error)]
pub enum Error {
    /// A capability, or the right to gain one, cannot be given up.
    #[error("cannot drop privileges")]
    Privileges(#[source] io::Error),
    /// A path that stays reachable cannot be opened.
    #[error("cannot open the cache directory")]
    Path(#[from] landlock::PathFdError),
    /// The kernel refuses the Landlock rules.
    #[error("Landlock refuses the rules")]
    Landlock(#[from] RulesetError),
    /// The kernel refuses the seccomp filter.
    #[error("seccomp refuses the filter")]
    Seccomp(#[from] seccompiler::Error),
}

/// Files that stay accessible, besides open ones.
#[derive(Clone, Debug)]
pub struct Reach {
    /// Directory in which files are read, written, made and removed.
    pub cache: PathBuf,
    /// Files that are read again: credentials. They may be replaced, so that their directories stay
    /// readable.
    pub credentials: Vec<PathBuf>,
}

/// Confines the process for good. Call it while the process has one thread.
///
/// What the kernel lacks is left out, with a warning.
///
/// # Errors
/// An [`Error`]: the kernel has a mechanism and refuses to apply it.
pub fn enter(reach: &Reach) -> Result<(), Error> {
    name_service::load();
    confine::drop_all_but(CapabilitySet::empty()).map_err(Error::Privileges)?;
    close_paths(reach)?.warn(NAME, "Landlock");
    filter_calls()?.warn(NAME, "seccomp");
    Ok(())
}

fn close_paths(reach: &Reach) -> Result<Support, Error> {
    if confine::landlock::is_forbidden() {
        return Ok(Support::Forbidden);
    }
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::BindTcp)?
        .scope(Scope::from_all(NEWEST))?
        .create()?;
    // Renaming between the directories of the cache is `Refer`.
    let cache = AccessFs::ReadFile
        | AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::ReadDir
        | AccessFs::MakeReg
        | AccessFs::MakeDir
        | AccessFs::RemoveFile
        | AccessFs::RemoveDir
        | AccessFs::Refer;
    rules = rules.add_rule(PathBeneath::new(PathFd::new(&reach.cache)?, cache))?;
    let readable = AccessFs::ReadFile | AccessFs::ReadDir;
    for file in &reach.credentials {
        rules = allow(rules, parent_of(file), readable)?;
        // A link may lead elsewhere.
        if let Ok(target) = file.canonicalize() {
            rules = allow(rules, parent_of(&target), readable)?;
        }
    }
    for path in RESOLVER_FILES {
        rules = allow(rules, Path::new(path), AccessFs::ReadFile.into())?;
    }
    Ok(rules.restrict_self()?.landlock.into())
}

/// Adds a rule for a path, if there is something.
fn allow(
    rules: RulesetCreated,
    path: &Path,
    rights: BitFlags<AccessFs>,
) -> Result<RulesetCreated, Error> {
    match PathFd::new(path) {
        // A right that only directories have is left out for a file.
        Ok(opened) => Ok(rules.add_rule(PathBeneath::new(opened, rights))?),
        Err(_) => Ok(rules),
    }
}

fn filter_calls() -> Result<Support, Error> {
    let thread = Test::Bits {
        mask: THREAD,
        set: THREAD,
    };
    let mut conditional = vec![
        (libc::SYS_clone, 0, thread),
        (libc::SYS_mmap, 2, NOT_EXECUTABLE),
        (libc::SYS_mprotect, 2, NOT_EXECUTABLE),
        (libc::SYS_prctl, 0, Test::Is(libc::PR_SET_NAME)),
        (libc::SYS_ioctl, 1, Test::Is(libc::FIONBIO as c_int)),
        (libc::SYS_ioctl, 1, Test::Is(libc::FIONREAD as c_int)),
    ];
    let families = FAMILIES.map(|family| (libc::SYS_socket, 0, Test::Is(family)));
    conditional.extend(families);
    let calls = Calls {
        allowed: ALLOWED.to_vec(),
        conditional,
        absent: ABSENT,
        forbidden: SeccompAction::Errno(libc::EPERM.unsigned_abs()),
    };
    match filter::compile(&calls) {
        Some(filter) => Ok(install(&filter)?),
        None => Ok(Support::Missing),
    }
}
