//! What the sandbox refuses, tried from inside.
//!
//! Each test starts a process for each thing to try; that process enters the sandbox, tries the
//! thing, and exits ([`probe`]).
#![allow(unsafe_code)] // some calls have no safe form

use std::env;
use std::ffi::CString;
use std::fs;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio, exit};
use std::ptr::{null, null_mut};
use std::thread;

use io_uring::{IoUring, opcode};
use libc::{SIGABRT, SIGSYS};
use ovbd_vhost::daemon::sandbox::{Reach, Sandbox, landlock};
use ovbd_vhost::engine::ring::Rings;
use ovbd_vhost::io::confine::Support;
use ovbd_vhost::io::vectored;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};

/// Variables of the environment that tell a process what to try, in which directory, and inside what.
const WHAT: &str = "OVBD_PROBE";
const DIRECTORY: &str = "OVBD_PROBE_DIRECTORY";
const INSIDE: &str = "OVBD_PROBE_INSIDE";

/// Exit status of a probe that succeeded: no error number, and not the 0 of a run without a test.
const WORKS: i32 = 200;

/// How a probe ends.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Works,
    Fails(i32),
    Killed(i32),
}

impl From<ExitStatus> for End {
    fn from(status: ExitStatus) -> Self {
        match (status.signal(), status.code()) {
            (Some(signal), _) => Self::Killed(signal),
            (None, Some(WORKS)) => Self::Works,
            (None, code) => Self::Fails(code.unwrap()),
        }
    }
}

/// A process that enters the sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Inside {
    /// A read-only daemon that serves.
    ReadOnly,
    /// The same with `--io pread`.
    Pread,
    /// A daemon with a writable layer that serves.
    Writable,
    /// A read-only daemon that still parses its layers.
    Parsing,
    /// A daemon with a writable layer that still opens it.
    ParsingWritable,
    /// The image tool, which reads layers.
    Tool,
    /// The image tool, which reads a writable layer and writes to an open file.
    ToolExport,
}

impl Inside {
    const ALL: [Self; 7] = [
        Self::ReadOnly,
        Self::Pread,
        Self::Writable,
        Self::Parsing,
        Self::ParsingWritable,
        Self::Tool,
        Self::ToolExport,
    ];

    /// Runs [`probe`] in a process of this kind.
    fn tries(self, what: &str, directory: &Path) -> End {
        let mut probe = Command::new(env::current_exe().unwrap());
        probe
            .args([
                "--exact",
                "probes::what_no_stage_needs_kills",
                "--nocapture",
            ])
            .env(WHAT, what)
            .env(DIRECTORY, directory)
            .env(INSIDE, format!("{self:?}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        probe.status().unwrap().into()
    }

    fn enter(self, directory: &Path) {
        let directories = [directory.to_owned()];
        let writable = matches!(self, Self::Writable | Self::ParsingWritable);
        let tool = matches!(self, Self::Tool | Self::ToolExport);
        let only = |condition: bool| -> &[_] { if condition { &directories } else { &[] } };
        let sandbox = Sandbox::enter(&Reach {
            sockets: only(!writable && !tool),
            directories: only(writable),
            readable: only(self == Self::ToolExport),
            write: self == Self::ToolExport,
            progress: tool,
            rings: !tool && self != Self::Pread,
            ..Reach::default()
        });
        let sandbox = sandbox.unwrap();
        if matches!(self, Self::ReadOnly | Self::Pread | Self::Writable) {
            sandbox.tighten().unwrap();
        }
    }
}

/// Whether this kernel has Landlock.
pub fn has_landlock() -> bool {
    // In a thread, which the rules hold for.
    let closed = thread::spawn(|| landlock::close(&Reach::default()).unwrap());
    closed.join().unwrap() == Support::Full
}

/// What is the same in every kind of process and at every stage.
const NEVER: [&str; 17] = [
    "make a ring",
    "set an attribute by a ring of its own",
    "register with a ring",
    "change a mode",
    "set an attribute",
    "make a symbolic link",
    "make a directory",
    "tcp socket",
    "unix socket",
    "run a program",
    "fork",
    "new namespace",
    "trace",
    "signal its parent",
    "become another user",
    "map code",
    "turn data into code",
];

#[test]
fn what_no_stage_needs_kills() {
    if let Ok(what) = env::var(WHAT) {
        probe(&what);
    }
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("socket"), "").unwrap();
    for inside in Inside::ALL {
        for what in NEVER {
            let end = inside.tries(what, directory.path());
            assert_eq!(end, End::Killed(SIGSYS), "{inside:?}: {what}");
        }
    }
}

#[test]
fn rings_are_read_from_unless_reads_wait() {
    let directory = tempfile::tempdir().unwrap();
    let what = "read by a ring made before";
    for inside in Inside::ALL {
        let expected = match inside {
            Inside::Pread | Inside::Tool | Inside::ToolExport => End::Killed(SIGSYS),
            _ => End::Works,
        };
        assert_eq!(inside.tries(what, directory.path()), expected, "{inside:?}");
    }
}

#[test]
fn a_socket_is_bound_in_its_directory_and_before_serving() {
    let denied = match has_landlock() {
        true => End::Fails(libc::EACCES),
        false => End::Works,
    };
    for (inside, what, expected) in [
        (Inside::Parsing, "bind", End::Works),
        (Inside::Parsing, "bind elsewhere", denied),
        (Inside::Parsing, "connect", End::Killed(SIGSYS)),
        (Inside::Parsing, "open", End::Fails(libc::ENOSYS)),
        (Inside::Parsing, "create", End::Fails(libc::ENOSYS)),
        (Inside::Parsing, "write what is open", End::Killed(SIGSYS)),
        (Inside::ParsingWritable, "bind", End::Killed(SIGSYS)),
        (Inside::ReadOnly, "bind", End::Killed(SIGSYS)),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let end = inside.tries(what, directory.path());
        assert_eq!(end, expected, "{inside:?}: {what}");
    }
}

#[test]
fn the_tool_reads_what_is_open_and_the_directory_of_a_writable_layer() {
    let fenced = has_landlock();
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("socket"), "").unwrap();
    for (inside, what, expected) in [
        (Inside::Tool, "read what is open", End::Works),
        (Inside::Tool, "thread", End::Works),
        (
            Inside::Tool,
            "ask for the width of the terminal",
            End::Fails(libc::ENOTTY),
        ),
        (Inside::Tool, "open", End::Fails(libc::ENOSYS)),
        (Inside::Tool, "open here", End::Fails(libc::ENOSYS)),
        (Inside::Tool, "create", End::Fails(libc::ENOSYS)),
        (Inside::Tool, "write what is open", End::Killed(SIGSYS)),
        (Inside::Tool, "remove in the directory", End::Killed(SIGSYS)),
        (Inside::Tool, "rename", End::Killed(SIGSYS)),
        (Inside::ToolExport, "write what is open", End::Works),
        (Inside::ToolExport, "open here", End::Works),
        (Inside::ToolExport, "open", End::Fails(libc::EACCES)),
        (Inside::ToolExport, "create", End::Fails(libc::EACCES)),
        (
            Inside::ToolExport,
            "open to write elsewhere",
            End::Fails(libc::EACCES),
        ),
        (
            Inside::ToolExport,
            "remove in the directory",
            End::Killed(SIGSYS),
        ),
        (Inside::ToolExport, "rename", End::Killed(SIGSYS)),
        (
            Inside::ReadOnly,
            "ask for the width of the terminal",
            End::Killed(SIGSYS),
        ),
    ] {
        if fenced || expected != End::Fails(libc::EACCES) {
            assert_eq!(
                inside.tries(what, directory.path()),
                expected,
                "{inside:?}: {what}"
            );
        }
    }
}

#[test]
fn what_serving_does_not_need_is_refused() {
    let fenced = has_landlock();
    let directory = tempfile::tempdir().unwrap();
    let denied = |end: End| if fenced { end } else { End::Works };
    for (what, expected) in [
        ("thread", End::Works),
        ("read what is open", End::Works),
        ("remove in the directory", End::Works),
        ("abort", End::Killed(SIGABRT)),
        ("open", End::Fails(libc::ENOSYS)),
        ("create", End::Fails(libc::ENOSYS)),
        ("remove elsewhere", denied(End::Fails(libc::EACCES))),
        ("rename", End::Killed(SIGSYS)),
        ("write what is open", End::Killed(SIGSYS)),
    ] {
        fs::write(directory.path().join("socket"), "").unwrap();
        let end = Inside::ReadOnly.tries(what, directory.path());
        assert_eq!(end, expected, "{what}");
    }
}

#[test]
fn a_writable_layer_takes_its_directory_and_no_more() {
    let fenced = has_landlock();
    let directory = tempfile::tempdir().unwrap();
    let denied = || End::Fails(libc::EACCES);
    for (what, expected) in [
        ("write what is open", End::Works),
        ("replace a file", End::Works),
        ("create", End::Works),
        ("rename", End::Works),
        ("link", End::Works),
        ("remove in the directory", End::Works),
        ("open", denied()),
        ("open to write elsewhere", denied()),
        ("create elsewhere", denied()),
        ("remove elsewhere", denied()),
        ("rename to elsewhere", denied()),
        ("rename from elsewhere", denied()),
        ("link to elsewhere", denied()),
        ("link from elsewhere", End::Fails(libc::EXDEV)),
        ("truncate elsewhere", End::Killed(SIGSYS)),
    ] {
        for inside in [Inside::ParsingWritable, Inside::Writable] {
            fs::write(directory.path().join("socket"), "").unwrap();
            for left in ["other", "linked"] {
                let _ = fs::remove_file(directory.path().join(left));
            }
            let end = inside.tries(what, directory.path());
            // Where nothing keeps a serving daemon to the directory, it neither opens files nor
            // changes names.
            let expected = match (fenced, inside, what) {
                (true, ..) | (_, _, "write what is open") => &expected,
                (false, Inside::Writable, "replace a file" | "create" | "open") => {
                    &End::Fails(libc::ENOSYS)
                }
                (false, ..) => continue,
            };
            assert_eq!(&end, expected, "{inside:?}: {what}");
        }
    }
}

/// Enters the sandbox and tries one thing; the exit status says what came of it.
fn probe(what: &str) -> ! {
    let directory = env::var(DIRECTORY).unwrap();
    let directory = Path::new(&directory);
    let elsewhere = tempfile::NamedTempFile::new().unwrap().into_temp_path();
    let open = fs::File::open("/proc/self/exe").unwrap();
    let page = || {
        let (rw, private) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE);
        // SAFETY: a new mapping at no given address.
        unsafe { libc::mmap(null_mut(), 4096, rw, private | libc::MAP_ANONYMOUS, -1, 0) }
    };
    let (page, code) = (page(), libc::PROT_READ | libc::PROT_EXEC);
    let written = fs::File::create(directory.join("written")).unwrap();
    let (rings, error) = Rings::make(1);
    assert!(error.is_none(), "{error:?}");
    let mut uring = rings.take().unwrap();
    let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    let bind = |path: &Path| {
        let address = SocketAddrUnix::new(path)?;
        rustix::net::bind(&socket, &address)?;
        Ok(rustix::net::listen(&socket, 1)?)
    };
    let inside = env::var(INSIDE).unwrap();
    let inside = Inside::ALL
        .into_iter()
        .find(|known| format!("{known:?}") == inside);
    inside.unwrap().enter(directory);

    let made = |result: i32| match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    };
    // SAFETY: each call is given valid arguments; those that would do harm are not let through,
    // and if they were, only this process would be hurt.
    let outcome = unsafe {
        match what {
            "thread" => thread::Builder::new()
                .spawn(|| {})
                .map(|thread| thread.join().unwrap()),
            "read what is open" => io::Read::read_exact(&mut &open, &mut [0; 4]),
            "remove in the directory" => fs::remove_file(directory.join("socket")),
            "abort" => libc::abort(),
            "open" => fs::File::open("/etc/passwd").map(drop),
            "open here" => fs::File::open(directory.join("socket")).map(drop),
            "ask for the width of the terminal" => {
                let mut size = [0u16; 4];
                made(libc::ioctl(
                    written.as_raw_fd(),
                    libc::TIOCGWINSZ,
                    &raw mut size,
                ))
            }
            "create" => fs::write(directory.join("new"), ""),
            "make a ring" => IoUring::new(1).map(drop),
            "set an attribute by a ring of its own" => set_attribute_by_ring(directory),
            "register with a ring" => {
                let ring = uring.as_fd().as_raw_fd();
                made(libc::syscall(libc::SYS_io_uring_register, ring, 0, null::<u8>(), 0) as i32)
            }
            "read by a ring made before" => {
                let buffer = uring.buffer(4);
                uring.read(0, open.as_fd(), 0, buffer, 0).unwrap();
                uring.wait().unwrap();
                uring.completed().unwrap().result.map(drop)
            }
            "set an attribute" => {
                let (path, name) = (c_path(directory), c"user.probe".as_ptr());
                made(libc::setxattr(path.as_ptr(), name, name.cast(), 4, 0))
            }
            "bind" => bind(&directory.join("bound")),
            "bind elsewhere" => bind(&elsewhere.with_extension("bound")),
            "connect" => {
                let address = SocketAddrUnix::new(directory.join("bound")).unwrap();
                rustix::net::connect(&socket, &address).map_err(io::Error::from)
            }
            "write what is open" => write_and_sync(&written),
            "replace a file" => replace(directory),
            "remove elsewhere" => fs::remove_file(&elsewhere),
            "open to write elsewhere" => fs::File::options().write(true).open(&elsewhere).map(drop),
            "create elsewhere" => fs::write(elsewhere.with_extension("new"), ""),
            "rename to elsewhere" => {
                fs::rename(directory.join("socket"), elsewhere.with_extension("new"))
            }
            "rename from elsewhere" => fs::rename(&elsewhere, directory.join("other")),
            "link" => fs::hard_link(directory.join("socket"), directory.join("linked")),
            "link to elsewhere" => {
                fs::hard_link(directory.join("socket"), elsewhere.with_extension("new"))
            }
            "link from elsewhere" => fs::hard_link(&elsewhere, directory.join("linked")),
            "make a symbolic link" => symlink("/etc/passwd", directory.join("linked")),
            "make a directory" => fs::create_dir(directory.join("linked")),
            "truncate elsewhere" => {
                let path = c_path(&elsewhere);
                made(libc::truncate(path.as_ptr(), 0))
            }
            "rename" => fs::rename(directory.join("socket"), directory.join("other")),
            "change a mode" => {
                fs::set_permissions(directory.join("socket"), fs::Permissions::from_mode(0o777))
            }
            "tcp socket" => TcpListener::bind("127.0.0.1:0").map(drop),
            "unix socket" => UnixStream::connect(directory.join("socket")).map(drop),
            "run a program" => Err(Command::new("/bin/true").exec()),
            "fork" => made(libc::fork()),
            "new namespace" => made(libc::unshare(libc::CLONE_NEWUSER)),
            "trace" => made(libc::ptrace(libc::PTRACE_TRACEME, 0, null::<u8>(), 0) as i32),
            "signal its parent" => made(libc::kill(libc::getppid(), 0)),
            "become another user" => made(libc::setuid(12345)),
            "map code" => {
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                let page = libc::mmap(null_mut(), 4096, code, flags, -1, 0);
                made(if page == libc::MAP_FAILED { -1 } else { 0 })
            }
            "turn data into code" => made(libc::mprotect(page, 4096, code)),
            other => panic!("no probe {other}"),
        }
    };
    exit(match outcome {
        Ok(()) => WORKS,
        Err(error) => error.raw_os_error().unwrap(),
    });
}

/// Does to a file what is done to one of a writable layer.
fn write_and_sync(file: &fs::File) -> io::Result<()> {
    let mut bytes = [7u8; 512];
    let piece = vm_memory::VolatileSlice::from(&mut bytes[..]);
    vectored::write_all_at(file, &[piece, piece], 4096)?;
    file.write_all_at(&[1; 10], 0)?;
    file.set_len(8192)?;
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(file, hole, 0, 4096)?;
    file.sync_data()?;
    file.sync_all()
}

/// Puts a file in another's place, and makes that last.
fn replace(directory: &Path) -> io::Result<()> {
    let new = directory.join("index.new");
    fs::write(&new, "new")?;
    fs::rename(&new, directory.join("index"))?;
    fs::File::open(directory)?.sync_all()
}

fn c_path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap()
}

/// Sets an attribute of a file by a ring that is not restricted as ours are.
fn set_attribute_by_ring(directory: &Path) -> io::Result<()> {
    let mut ring = IoUring::new(1)?;
    let (path, name) = (c_path(&directory.join("written")), c"user.probe".as_ptr());
    let set = opcode::SetXattr::new(name, name.cast(), path.as_ptr(), 4).build();
    // SAFETY: the strings live until the completion is taken.
    unsafe { ring.submission().push(&set) }.unwrap();
    ring.submit_and_wait(1)?;
    match ring.completion().next().unwrap().result() {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(-errno)),
    }
}
