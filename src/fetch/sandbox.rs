//! The sandbox of the processes that talk to registries: network and cache, and little else.
//!
//! They parse data from the network (HTTP, TLS, DNS), and have neither guest memory nor layers' tables.
//! Landlock limits the files to the cache, the directories of credentials and the configuration of
//! name resolution, and forbids listening. seccomp forbids running programs, and all system calls that
//! fetching does not need. No capability is left. A forbidden call fails with EPERM: the C library's resolver
//! tries some that it can do without.
//!
//! Ports to connect to are not limited: a registry redirects to stores at ports of their own.

use std::collections::BTreeMap;
use std::env::consts::ARCH;
use std::io;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, LandlockStatus,
    PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError,
    Scope,
};
use libc::{c_int, c_long};
use rustix::thread::{self, CapabilitySet, CapabilitySets};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};
use thiserror::Error;

use crate::io::directory::parent_of;

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

/// Address families of sockets: the resolver asks a name service and the kernel's routing tables.
const FAMILIES: [c_int; 4] = [
    libc::AF_INET,
    libc::AF_INET6,
    libc::AF_UNIX,
    libc::AF_NETLINK,
];

/// Flags of `clone` for a thread instead of a process.
const THREAD: c_int = libc::CLONE_VM | libc::CLONE_SIGHAND | libc::CLONE_THREAD;

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
    /// The seccomp filter does not compile.
    #[error("the seccomp filter does not compile")]
    Filter(#[from] BackendError),
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
    drop_capabilities().map_err(|errno| Error::Privileges(errno.into()))?;
    if !close_paths(reach)? {
        log::warn!("the fetcher's sandbox lacks Landlock: this kernel does not support it");
    }
    if !filter_calls()? {
        log::warn!("the fetcher's sandbox lacks seccomp: no filter for this processor");
    }
    Ok(())
}

fn drop_capabilities() -> rustix::io::Result<()> {
    thread::set_no_new_privs(true)?;
    thread::clear_ambient_capability_set()?;
    let none = CapabilitySet::empty();
    let sets = CapabilitySets {
        effective: none,
        permitted: none,
        inheritable: none,
    };
    thread::set_capabilities(None, sets)
}

/// Returns whether the kernel has Landlock.
fn close_paths(reach: &Reach) -> Result<bool, Error> {
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
    let status = rules.restrict_self()?.landlock;
    Ok(matches!(status, LandlockStatus::Available { .. }))
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

/// Returns whether there is a filter for this processor.
fn filter_calls() -> Result<bool, Error> {
    use SeccompCmpOp::{Eq, MaskedEq};
    let Ok(arch) = TargetArch::try_from(ARCH) else {
        return Ok(false);
    };
    let rule = |argument, test, value: c_int| {
        let value = u64::from(value.cast_unsigned());
        let width = SeccompCmpArgLen::Dword;
        let condition = SeccompCondition::new(argument, width, test, value)?;
        SeccompRule::new(vec![condition])
    };
    let no_code = MaskedEq(u64::from(libc::PROT_EXEC.cast_unsigned()));
    let thread = MaskedEq(u64::from(THREAD.cast_unsigned()));
    let mut rules: BTreeMap<_, _> = ALLOWED.iter().map(|call| (*call, Vec::new())).collect();
    for family in FAMILIES {
        let sockets: &mut Vec<_> = rules.entry(libc::SYS_socket).or_default();
        sockets.push(rule(0, Eq, family)?);
    }
    rules.insert(libc::SYS_clone, vec![rule(0, thread, THREAD)?]);
    rules.insert(libc::SYS_mmap, vec![rule(2, no_code.clone(), 0)?]);
    rules.insert(libc::SYS_mprotect, vec![rule(2, no_code, 0)?]);
    rules.insert(libc::SYS_prctl, vec![rule(0, Eq, libc::PR_SET_NAME)?]);
    let requests = [libc::FIONBIO, libc::FIONREAD].map(|request| request as c_int);
    let requests = requests.map(|request| rule(1, Eq, request));
    rules.insert(
        libc::SYS_ioctl,
        requests.into_iter().collect::<Result<_, _>>()?,
    );
    // Its flags lie in memory, where no filter can read them; C libraries fall back to `clone`.
    let absent = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let error = |number: c_int| SeccompAction::Errno(number.cast_unsigned());
    let allow = SeccompAction::Allow;
    let absent = SeccompFilter::new(absent, allow.clone(), error(libc::ENOSYS), arch)?;
    // Of two filters, the kernel obeys the one with the stricter answer, and of two errors the one
    // that was added last.
    rules.insert(libc::SYS_clone3, Vec::new());
    let known = SeccompFilter::new(rules, error(libc::EPERM), allow, arch)?;
    for filter in [absent, known] {
        let program: BpfProgram = filter.try_into()?;
        seccompiler::apply_filter(&program)?;
    }
    Ok(true)
}
