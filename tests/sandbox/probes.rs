//! What the sandbox refuses, tried from inside.
//!
//! Each test starts itself anew for each thing to try; that process enters the sandbox, tries the
//! thing, and exits ([`probe`]).
#![allow(unsafe_code)] // some calls have no safe form

use std::env;
use std::ffi::CString;
use std::fs;
use std::io;
use std::net::TcpListener;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio, exit};
use std::ptr::{null, null_mut};
use std::thread;

use io_uring::{IoUring, opcode, types};
use libc::{SIGABRT, SIGSYS};
use ovbd_vhost::daemon::sandbox::{self, Support, landlock};
use ovbd_vhost::io::vectored;
use rustix::fs::{FallocateFlags, fallocate};

/// Variables of the environment that tell a process what to try, and in which directory.
const WHAT: &str = "OVBD_PROBE";
const DIRECTORY: &str = "OVBD_PROBE_DIRECTORY";

/// Exit status of a probe that succeeded: no error number, and not the 0 of a run without a test.
const WORKS: i32 = 200;

/// What is to come of a probe.
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

/// Runs the test `test` in a process of its own, where it calls [`probe`].
fn try_inside(test: &str, what: &str, directory: &Path) -> End {
    let mut probe = Command::new(env::current_exe().unwrap());
    probe
        .args(["--exact", test, "--nocapture"])
        .env(WHAT, what)
        .env(DIRECTORY, directory)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    probe.status().unwrap().into()
}

#[test]
fn what_serving_does_not_need_is_refused() {
    const OWN: &str = "probes::what_serving_does_not_need_is_refused";
    if let Ok(what) = env::var(WHAT) {
        probe(&what, |directory| {
            sandbox::enter(&[directory], &[]).unwrap();
        });
    }
    // In a thread, for it holds for that.
    let landlock = thread::spawn(|| landlock::close(&[], &[]).unwrap());
    let fenced = landlock.join().unwrap() == Support::Full;
    let directory = tempfile::tempdir().unwrap();
    let denied = |end: End| if fenced { end } else { End::Works };
    for (what, expected) in [
        ("thread", End::Works),
        ("read what is open", End::Works),
        ("remove in the directory", End::Works),
        ("abort", End::Killed(SIGABRT)),
        ("open", End::Fails(libc::ENOSYS)),
        ("create", End::Fails(libc::ENOSYS)),
        ("open by io_uring", denied(End::Fails(libc::EACCES))),
        ("remove elsewhere", denied(End::Fails(libc::EACCES))),
        ("rename", End::Killed(SIGSYS)),
        ("write what is open", End::Killed(SIGSYS)),
        ("change a mode", End::Killed(SIGSYS)),
        ("tcp socket", End::Killed(SIGSYS)),
        ("unix socket", End::Killed(SIGSYS)),
        ("run a program", End::Killed(SIGSYS)),
        ("fork", End::Killed(SIGSYS)),
        ("new namespace", End::Killed(SIGSYS)),
        ("trace", End::Killed(SIGSYS)),
        ("signal its parent", End::Killed(SIGSYS)),
        ("become another user", End::Killed(SIGSYS)),
        ("map code", End::Killed(SIGSYS)),
        ("turn data into code", End::Killed(SIGSYS)),
    ] {
        fs::write(directory.path().join("socket"), "").unwrap();
        let end = try_inside(OWN, what, directory.path());
        assert_eq!(end, expected, "{what}");
    }
}

#[test]
fn a_writable_layer_takes_its_directory_and_no_more() {
    const OWN: &str = "probes::a_writable_layer_takes_its_directory_and_no_more";
    if let Ok(what) = env::var(WHAT) {
        probe(&what, |directory| {
            sandbox::enter(&[], &[directory.to_owned()]).unwrap();
        });
    }
    let landlock = thread::spawn(|| landlock::close(&[], &[]).unwrap());
    let fenced = landlock.join().unwrap() == Support::Full;
    let directory = tempfile::tempdir().unwrap();
    // Where nothing keeps them to the directory, files are not opened and names not changed.
    let open = |end: End| {
        if fenced {
            end
        } else {
            End::Fails(libc::ENOSYS)
        }
    };
    let name = |end: End| if fenced { end } else { End::Killed(SIGSYS) };
    let denied = || End::Fails(libc::EACCES);
    for (what, expected) in [
        ("write what is open", End::Works),
        ("replace a file", open(End::Works)),
        ("create", open(End::Works)),
        ("rename", name(End::Works)),
        ("link", name(End::Works)),
        ("remove in the directory", name(End::Works)),
        ("open", open(denied())),
        ("open to write elsewhere", open(denied())),
        (
            "open by io_uring",
            if fenced { denied() } else { End::Works },
        ),
        ("create elsewhere", open(denied())),
        ("remove elsewhere", name(denied())),
        ("rename to elsewhere", name(denied())),
        ("rename from elsewhere", name(denied())),
        ("link to elsewhere", name(denied())),
        ("link from elsewhere", name(End::Fails(libc::EXDEV))),
        ("make a symbolic link", End::Killed(SIGSYS)),
        ("make a directory", End::Killed(SIGSYS)),
        ("truncate elsewhere", End::Killed(SIGSYS)),
        ("change a mode", End::Killed(SIGSYS)),
        ("tcp socket", End::Killed(SIGSYS)),
        ("unix socket", End::Killed(SIGSYS)),
        ("run a program", End::Killed(SIGSYS)),
        ("fork", End::Killed(SIGSYS)),
        ("new namespace", End::Killed(SIGSYS)),
        ("trace", End::Killed(SIGSYS)),
        ("signal its parent", End::Killed(SIGSYS)),
        ("become another user", End::Killed(SIGSYS)),
        ("map code", End::Killed(SIGSYS)),
        ("turn data into code", End::Killed(SIGSYS)),
    ] {
        fs::write(directory.path().join("socket"), "").unwrap();
        for left in ["other", "linked"] {
            let _ = fs::remove_file(directory.path().join(left));
        }
        let end = try_inside(OWN, what, directory.path());
        assert_eq!(end, expected, "{what}");
    }
}

/// Enters the sandbox and tries one thing; the exit status says what came of it.
fn probe(what: &str, enter: fn(&Path)) -> ! {
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
    enter(directory);

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
            "create" => fs::write(directory.join("new"), ""),
            "open by io_uring" => open_by_ring(),
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
                let path = CString::new(elsewhere.as_os_str().as_bytes()).unwrap();
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

/// Opens a file by a ring that is not restricted as ours are.
fn open_by_ring() -> io::Result<()> {
    let mut ring = IoUring::new(1)?;
    let path = CString::new("/etc/passwd").unwrap();
    let open = opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), path.as_ptr()).build();
    // SAFETY: the path lives until the completion is taken.
    unsafe { ring.submission().push(&open) }.unwrap();
    ring.submit_and_wait(1)?;
    match ring.completion().next().unwrap().result() {
        errno @ ..0 => Err(io::Error::from_raw_os_error(-errno)),
        _ => Ok(()),
    }
}
