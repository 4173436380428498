//! The image tool, subverted: the test takes the place of foreign code in its parser.
//!
//! The tool is traced until it has entered its sandbox. Its next system call is then replaced by one of
//! an attacker's choice.
#![allow(unsafe_code)] // ptrace has no safe form

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::ptr::null_mut;

use common::disk::deep;
use common::registry_server::Server;
use common::remote::{Layers, Place};
use libc::{c_int, c_long, c_void, pid_t, user_regs_struct};
use serde_json::json;
use tempfile::TempDir;

/// Filters of the first stage: when it is in force, the tool is inside.
const FILTERS: usize = 1;

/// What became of a system call.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// A signal killed the process.
    Killed(c_int),
    /// The call returned; negative: an error number.
    Returned(i64),
}

/// A system call. A path takes the place of the argument with this number.
#[derive(Clone, Copy)]
struct Call<'a> {
    number: c_long,
    arguments: [u64; 3],
    path: Option<(usize, &'a str)>,
}

const fn call(number: c_long, arguments: [u64; 3]) -> Call<'static> {
    Call {
        number,
        arguments,
        path: None,
    }
}

fn with_path(number: c_long, arguments: [u64; 3], at: usize, path: &str) -> Call<'_> {
    Call {
        number,
        arguments,
        path: Some((at, path)),
    }
}

fn open(path: &str, flags: c_int) -> Call<'_> {
    let flags = u64::from(flags.cast_unsigned());
    with_path(libc::SYS_openat, [libc::AT_FDCWD as u64, 0, flags], 1, path)
}

/// Starts the tool, traced from its first instruction on. [`end`] waits for it.
#[expect(
    clippy::zombie_processes,
    reason = "waited for with the processes that it starts"
)]
fn start(dir: &Path, arguments: &[&str]) -> pid_t {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ovbd"));
    command
        .args(arguments)
        .current_dir(dir)
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    // SAFETY: the closure makes one system call, without pointers.
    unsafe {
        command.pre_exec(|| match libc::ptrace(libc::PTRACE_TRACEME) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
    let child = command.spawn().unwrap();
    child.id().cast_signed()
}

fn request(what: libc::c_uint, pid: pid_t, data: *mut c_void) {
    // SAFETY: `data` is a number, or points to a struct that the request reads or fills.
    let result = unsafe { libc::ptrace(what, pid, null_mut::<c_void>(), data) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

fn registers(pid: pid_t) -> user_regs_struct {
    // SAFETY: the struct has numbers only.
    let mut registers: user_regs_struct = unsafe { std::mem::zeroed() };
    request(libc::PTRACE_GETREGS, pid, (&raw mut registers).cast());
    registers
}

/// Puts a call in the place of the one that the process is about to make.
fn replace(pid: pid_t, mut at_entry: user_regs_struct, call: Call<'_>) {
    let [first, second, third] = call.arguments;
    (at_entry.rdi, at_entry.rsi, at_entry.rdx) = (first, second, third);
    at_entry.orig_rax = call.number as u64;
    if let Some((number, path)) = call.path {
        // Below the stack and its red zone.
        let place = at_entry.rsp - 8192;
        let memory = File::options()
            .write(true)
            .open(format!("/proc/{pid}/mem"))
            .unwrap();
        let bytes = [path.as_bytes(), b"\0"].concat();
        memory.write_all_at(&bytes, place).unwrap();
        match number {
            0 => at_entry.rdi = place,
            _ => at_entry.rsi = place,
        }
    }
    request(libc::PTRACE_SETREGS, pid, (&raw mut at_entry).cast());
}

/// The next event of any traced process.
fn wait() -> (pid_t, c_int) {
    let mut status = 0;
    // SAFETY: the pointer is valid for the call.
    let pid = unsafe { libc::waitpid(-1, &mut status, libc::__WALL | libc::__WNOTHREAD) };
    assert!(pid > 0, "{}", std::io::Error::last_os_error());
    (pid, status)
}

/// Runs the tool, and makes it try a call as soon as it is inside.
fn subvert(dir: &Path, arguments: &[&str], call: Call<'_>) -> Verdict {
    subvert_when(dir, arguments, |_| Some(call))
}

/// Whether a traced process is the tool. The fetcher of layers in a registry, and what else it starts, have
/// a sandbox and a name of their own.
fn is_tool(pid: pid_t) -> bool {
    let program = fs::read(format!("/proc/{pid}/cmdline")).unwrap();
    program.starts_with(env!("CARGO_BIN_EXE_ovbd").as_bytes())
}

/// Runs the tool, and makes it try the call that `choose` returns, which is asked before each call of the
/// tool once it is inside.
fn subvert_when<'a>(
    dir: &Path,
    arguments: &[&str],
    choose: impl Fn(pid_t) -> Option<Call<'a>>,
) -> Verdict {
    let first = start(dir, arguments);
    // Traced processes: whether they are in a system call, and filters that were installed.
    let mut traced: HashMap<pid_t, (bool, usize)> = HashMap::new();
    let mut subverted = None;
    // What the call returned. A call that kills returns to the tracer, too.
    let mut result = None;
    let verdict = loop {
        let (pid, status) = wait();
        let signal = libc::WSTOPSIG(status);
        if libc::WIFSIGNALED(status) && subverted == Some(pid) {
            break Verdict::Killed(libc::WTERMSIG(status));
        }
        if !libc::WIFSTOPPED(status) {
            assert_ne!(
                pid, first,
                "the tool ended before it was inside: {status:#x}"
            );
            continue;
        }
        let mut pass_on = 0;
        if signal == libc::SIGTRAP | 0x80 {
            let (inside_call, filters) = traced.entry(pid).or_default();
            *inside_call = !*inside_call;
            let at_stop = registers(pid);
            match (*inside_call, subverted) {
                (true, None) if *filters == FILTERS && is_tool(pid) => {
                    if let Some(call) = choose(pid) {
                        replace(pid, at_stop, call);
                        subverted = Some(pid);
                    }
                }
                (true, Some(done)) if done == pid => {
                    break Verdict::Returned(result.unwrap());
                }
                (false, Some(done)) if done == pid => result = Some(at_stop.rax.cast_signed()),
                (false, _) if at_stop.orig_rax == libc::SYS_seccomp as u64 && at_stop.rax == 0 => {
                    *filters += 1;
                }
                _ => {}
            }
        } else if traced.is_empty() {
            let options = libc::PTRACE_O_TRACESYSGOOD
                | libc::PTRACE_O_TRACEFORK
                | libc::PTRACE_O_TRACECLONE
                | libc::PTRACE_O_EXITKILL;
            request(libc::PTRACE_SETOPTIONS, pid, options as *mut c_void);
            traced.insert(pid, (false, 0));
        } else if signal != libc::SIGTRAP && signal != libc::SIGSTOP {
            pass_on = signal;
        }
        request(libc::PTRACE_SYSCALL, pid, pass_on as *mut c_void);
    };
    end(traced.into_keys().chain([first]));
    verdict
}

/// Ends what still runs, and waits for it. A process can be waited for once its traced threads were.
fn end(running: impl Iterator<Item = pid_t>) {
    let kill = |pid| {
        // SAFETY: a call without pointers; the processes are ours.
        unsafe { libc::kill(pid, libc::SIGKILL) };
    };
    running.for_each(kill);
    let mut status = 0;
    loop {
        // SAFETY: the pointer is valid for the call.
        match unsafe { libc::waitpid(-1, &mut status, libc::__WALL | libc::__WNOTHREAD) } {
            -1 => return,
            // One that had just been started.
            pid if libc::WIFSTOPPED(status) => kill(pid),
            _ => {}
        }
    }
}

/// A directory with a layer and a writable layer, and another file.
fn prepare() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let (case, _) = deep();
    fs::copy(&case.layers[0], dir.path().join("layer")).unwrap();
    fs::write(dir.path().join("secret"), "s").unwrap();
    fs::create_dir(dir.path().join("upper")).unwrap();
    fs::write(dir.path().join("upper/other"), "o").unwrap();
    let made = Command::new(env!("CARGO_BIN_EXE_ovbd"))
        .args(["upper", "create", UPPER, "--size", "1M"])
        .current_dir(dir.path())
        .status();
    assert!(made.unwrap().success());
    dir
}

const UPPER: &str = "data=upper/d,index=upper/i";

const COMMANDS: [&[&str]; 10] = [
    &["check", "layer", "--threads", "1"],
    &["inspect", "layer"],
    &["export", "layer", "-o", "raw"],
    &["create", "--from", "secret", "raw", "--parent", "layer"],
    &["merge", "layer", "layer", "-o", "raw", "--force"],
    &["commit", "--upper", UPPER, "-o", "raw"],
    &["upper", "create", "data=e,index=f", "--parent", "layer"],
    &[
        "check",
        "layer",
        "--upper",
        UPPER,
        "--threads",
        "1",
        "--force",
    ],
    &["inspect", "layer", "--upper", UPPER, "--force"],
    &["export", "layer", "--upper", UPPER, "-o", "raw", "--force"],
];

/// Calls that end the tool.
fn forbidden() -> [(&'static str, Call<'static>); 13] {
    let exec = u64::from(libc::PROT_EXEC.cast_unsigned());
    let parent = u64::from(std::process::id());
    [
        (
            "socket",
            call(
                libc::SYS_socket,
                [libc::AF_INET as u64, libc::SOCK_STREAM as u64, 0],
            ),
        ),
        ("connect", call(libc::SYS_connect, [0, 0, 0])),
        (
            "program",
            with_path(libc::SYS_execve, [0; 3], 0, "/bin/true"),
        ),
        ("fork", call(libc::SYS_fork, [0; 3])),
        (
            "trace",
            call(libc::SYS_ptrace, [libc::PTRACE_ATTACH as u64, parent, 0]),
        ),
        ("signal", call(libc::SYS_kill, [parent, 0, 0])),
        ("unlink", with_path(libc::SYS_unlink, [0; 3], 0, "secret")),
        ("rename", with_path(libc::SYS_rename, [0; 3], 0, "secret")),
        ("link", with_path(libc::SYS_link, [0; 3], 0, "secret")),
        ("directory", with_path(libc::SYS_mkdir, [0; 3], 0, "made")),
        (
            "mode",
            with_path(libc::SYS_chmod, [0, 0o777, 0], 0, "secret"),
        ),
        ("ring", call(libc::SYS_io_uring_setup, [1, 0, 0])),
        ("code", call(libc::SYS_mprotect, [4096, 4096, exec])),
    ]
}

#[test]
fn a_subverted_tool_reaches_neither_the_network_nor_programs_nor_names_of_files() {
    let dir = prepare();
    for arguments in COMMANDS {
        for (what, call) in forbidden() {
            let verdict = subvert(dir.path(), arguments, call);
            assert_eq!(
                verdict,
                Verdict::Killed(libc::SIGSYS),
                "{arguments:?}: {what}"
            );
        }
    }
    assert_eq!(fs::read(dir.path().join("secret")).unwrap(), b"s");
    for made in ["raw", "e", "f"] {
        assert!(!dir.path().join(made).exists(), "{made}");
    }
}

#[test]
fn a_subverted_tool_opens_no_file_but_those_of_the_writable_layer() {
    let dir = prepare();
    let landlock = super::probes::has_landlock();
    let write = libc::O_WRONLY | libc::O_CREAT;
    for arguments in COMMANDS {
        let has_upper = arguments.contains(&"--upper");
        for (path, flags) in [
            ("secret", libc::O_RDONLY),
            ("/etc/passwd", libc::O_RDONLY),
            ("layer", libc::O_RDONLY),
            ("new", write),
            ("upper/new", write),
            ("upper/other", libc::O_WRONLY),
            ("upper/other", libc::O_RDONLY),
        ] {
            let expected = match (has_upper, path, flags) {
                (false, ..) => -i64::from(libc::ENOSYS),
                (true, "upper/other", libc::O_RDONLY) => 0,
                (true, ..) if landlock => -i64::from(libc::EACCES),
                (true, ..) => continue,
            };
            let verdict = subvert(dir.path(), arguments, open(path, flags));
            let Verdict::Returned(found) = verdict else {
                panic!("{arguments:?}: {path}: {verdict:?}");
            };
            assert_eq!(found.min(0), expected, "{arguments:?}: {path}");
        }
    }
    assert!(!Path::new(&dir.path().join("new")).exists());
}

/// A directory with the config of an image in a registry.
fn remote() -> (Place, Server) {
    let (layers, place) = (Layers::new(1), Place::default());
    let server = layers.registry();
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    fs::write(place.path("secret"), "s").unwrap();
    (place, server)
}

/// Commands that read layers in a registry.
const REMOTE_COMMANDS: [&[&str]; 5] = [
    &["inspect"],
    &["check", "--threads", "1"],
    &["export", "-o", "raw"],
    &["merge", "-o", "raw"],
    &["upper", "create", "data=e,index=f"],
];

/// A command with the options that name the image and the cache.
fn with_image<'a>(command: &[&'a str]) -> Vec<&'a str> {
    let options = ["--config", "config.v1.json", "--cache", "cache"];
    command.iter().copied().chain(options).collect()
}

/// Descriptors of the process that lead into the cache.
fn cached_descriptors(pid: pid_t, place: &Place) -> Vec<u64> {
    let cache = place.path("cache").canonicalize().unwrap();
    let links = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let links = links.map(|link| link.path());
    let cached = links.filter(|link: &PathBuf| {
        let target = fs::read_link(link);
        target.is_ok_and(|target| target.starts_with(&cache))
    });
    let number = |link: PathBuf| link.file_name()?.to_str()?.parse().ok();
    cached.filter_map(number).collect()
}

#[test]
fn a_subverted_tool_reaches_nothing_that_its_fetcher_does() {
    let (place, _server) = remote();
    let dir = place.path("");
    for (at, command) in REMOTE_COMMANDS.iter().enumerate() {
        let arguments = with_image(command);
        for (what, call) in forbidden() {
            // The table is the same for all commands that write, and for those that do not.
            if at > 0 && *command != REMOTE_COMMANDS[2] && what != "socket" && what != "unlink" {
                continue;
            }
            let verdict = subvert(&dir, &arguments, call);
            let killed = Verdict::Killed(libc::SIGSYS);
            assert_eq!(verdict, killed, "{arguments:?}: {what}");
        }
        for path in ["secret", "cache/lock", "config.v1.json", "/etc/resolv.conf"] {
            let verdict = subvert(&dir, &arguments, open(path, libc::O_RDONLY));
            let refused = Verdict::Returned(-i64::from(libc::ENOSYS));
            assert_eq!(verdict, refused, "{arguments:?}: {path}");
        }
    }
    for made in ["raw", "e", "f"] {
        assert!(!place.path(made).exists(), "{made}");
    }
}

#[test]
fn a_subverted_tool_changes_no_cached_byte() {
    let (place, _server) = remote();
    let dir = place.path("");
    for command in REMOTE_COMMANDS {
        let arguments = with_image(command);
        for (what, number, rest) in [
            ("write", libc::SYS_write, [0, 1]),
            ("pwrite", libc::SYS_pwrite64, [0, 1]),
            ("truncate", libc::SYS_ftruncate, [0, 0]),
            ("allocate", libc::SYS_fallocate, [0, 0]),
            ("mode", libc::SYS_fchmod, [0o777, 0]),
        ] {
            let verdict = subvert_when(&dir, &arguments, |pid| {
                let blob = *cached_descriptors(pid, &place).first()?;
                Some(call(number, [blob, rest[0], rest[1]]))
            });
            // The descriptors that the fetcher sends are open for reading only.
            let refused = match verdict {
                Verdict::Killed(signal) => signal == libc::SIGSYS,
                Verdict::Returned(error) => {
                    error == -i64::from(libc::EBADF) || error == -i64::from(libc::EINVAL)
                }
            };
            assert!(refused, "{arguments:?}: {what}: {verdict:?}");
        }
    }
}
