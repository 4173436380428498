//! What the daemon, once it serves, can no longer do.
//!
//! The running daemon is looked at from outside (`/proc`). What its fences hold back is tried from
//! inside, by [`probe`], in processes of their own that enter the same sandbox.
#![allow(unsafe_code)] // some calls have no safe form

mod common;

use std::ffi::CString;
use std::fs;
use std::io;
use std::net::TcpListener;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio, exit};
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::PATIENCE;
use common::content::tagged;
use common::daemon::{self, Daemon};
use common::disk::{self, Disk};
use common::guest::{Guest, Options};
use common::writable::Writable;
use io_uring::{IoUring, opcode, types};
use libc::{SIGABRT, SIGSYS};
use ovbd_vhost::daemon::sandbox::{self, Support, files};
use ovbd_vhost::source::gather;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{CapabilitySet, capabilities};

/// The fields of `/proc/PID/status` for each thread of a process.
fn statuses(pid: Pid) -> Vec<String> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("the daemon runs");
    threads
        .map(|thread| fs::read_to_string(thread.unwrap().path().join("status")).unwrap())
        .collect()
}

fn field<'a>(status: &'a str, name: &str) -> &'a str {
    let line = status.lines().find(|line| line.starts_with(name));
    line.and_then(|line| line.split_once(":\t")).expect(name).1
}

/// No capability, none to gain, and a filter of system calls.
fn assert_confined(status: &str) {
    let name = field(status, "Name");
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(field(status, set), "0000000000000000", "{name}: {set}");
    }
    let own = capabilities(None).unwrap().effective;
    if own.contains(CapabilitySet::SETPCAP) {
        assert_eq!(field(status, "CapBnd"), "0000000000000000", "{name}");
    }
    assert_eq!(field(status, "NoNewPrivs"), "1", "{name}");
    assert_eq!(field(status, "Seccomp"), "2", "{name}: a filter");
}

/// Asserts that the threads of a process are these, and that all are confined.
fn assert_threads(pid: Pid, names: &[&str]) {
    let threads = statuses(pid);
    let mut found: Vec<_> = threads.iter().map(|status| field(status, "Name")).collect();
    found.sort_unstable();
    assert_eq!(found, names);
    threads.iter().for_each(|status| assert_confined(status));
}

#[test]
fn no_thread_of_the_running_daemon_has_a_privilege_left() {
    let disk = Disk::serve();
    let mut guest = disk.guest(Options {
        queues: 2,
        ..Options::default()
    });
    guest.assert_reads(0, &disk.content);
    let names = ["front-end", "ovbd-vhost", "queue-0", "queue-1"];
    assert_threads(disk.daemon.pid(), &names);
    assert!(!disk.daemon.log().contains("WARN"), "{}", disk.daemon.log());
}

#[test]
fn no_thread_of_a_writable_device_has_a_privilege_left() {
    let folder = tempfile::tempdir().unwrap();
    let control = folder.path().join("control");
    let disk = Writable::serve_with(&["--control", control.to_str().unwrap()]);
    let mut guest = disk.guest(Options {
        queues: 2,
        ..Options::default()
    });
    guest.write(0, 7, &[7; 4096]);
    guest.flush(1);
    let names = [
        "control",
        "flush-0",
        "flush-1",
        "front-end",
        "ovbd-vhost",
        "queue-0",
        "queue-1",
    ];
    assert_threads(disk.daemon.pid(), &names);
    assert!(!disk.daemon.log().contains("WARN"), "{}", disk.daemon.log());
}

/// It lives for a moment at the end: the daemon is ended until that was seen.
#[test]
fn the_thread_of_the_last_flush_has_no_privilege_left() {
    let mut disk = Writable::serve();
    let start = Instant::now();
    loop {
        let mut guest = disk.plain_guest();
        for sector in (0..16 << 10).step_by(512) {
            guest.write(0, sector, &tagged(512 * 512, sector));
        }
        drop(guest);
        let pid = disk.daemon.pid();
        let ended = AtomicBool::new(false);
        let seen = thread::scope(|scope| {
            let watching = scope.spawn(|| {
                while !ended.load(Ordering::Relaxed) {
                    let threads = fs::read_dir(format!("/proc/{pid}/task"))
                        .into_iter()
                        .flatten();
                    // Those that have ended meanwhile have no status.
                    let statuses = threads.filter_map(|thread| {
                        fs::read_to_string(thread.ok()?.path().join("status")).ok()
                    });
                    let last = |status: &String| field(status, "Name") == "last-flush";
                    if let Some(status) = statuses.into_iter().find(last) {
                        return Some(status);
                    }
                }
                None
            });
            assert_eq!(disk.daemon.terminate().code(), Some(0));
            ended.store(true, Ordering::Relaxed);
            watching.join().unwrap()
        });
        if let Some(status) = seen {
            return assert_confined(&status);
        }
        assert!(start.elapsed() < PATIENCE, "no last flush");
        disk.daemon.restart();
    }
}

#[test]
fn the_sandbox_can_be_left_out() {
    let mut disk = Disk::serve_with(&["--sandbox", "off"]);
    disk.assert_well();
    for status in statuses(disk.daemon.pid()) {
        assert_eq!(field(&status, "Seccomp"), "0");
        assert_eq!(field(&status, "NoNewPrivs"), "0");
    }
}

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
            (None, Some(0)) => Self::Works,
            (None, code) => Self::Fails(code.unwrap()),
        }
    }
}

/// Runs [`probe`] in a process of its own.
fn try_inside(what: &str, directory: &Path, writable: bool) -> End {
    let mut probe = Command::new(std::env::current_exe().unwrap());
    probe
        .args(["--exact", "probe", "--ignored", "--nocapture"])
        .env("OVBD_PROBE", what)
        .env("OVBD_PROBE_DIRECTORY", directory)
        .env("OVBD_PROBE_WRITABLE", writable.to_string())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    probe.status().unwrap().into()
}

#[test]
fn what_serving_does_not_need_is_refused() {
    // In a thread, for it holds for that.
    let landlock = thread::spawn(|| files::close(&[], &[]).unwrap());
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
        let end = try_inside(what, directory.path(), false);
        assert_eq!(end, expected, "{what}");
    }
}

#[test]
fn a_writable_layer_takes_its_directory_and_no_more() {
    let landlock = thread::spawn(|| files::close(&[], &[]).unwrap());
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
        let end = try_inside(what, directory.path(), true);
        assert_eq!(end, expected, "{what}");
    }
}

/// Enters the sandbox and tries one thing; the exit status says what came of it.
#[test]
#[ignore = "run by other tests, in processes of their own"]
fn probe() {
    let what = std::env::var("OVBD_PROBE").expect("run by another test");
    let directory = std::env::var("OVBD_PROBE_DIRECTORY").unwrap();
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
    match std::env::var("OVBD_PROBE_WRITABLE").as_deref() {
        Ok("true") => sandbox::enter(&[], &[directory.to_owned()]).unwrap(),
        _ => sandbox::enter(&[directory], &[]).unwrap(),
    }

    let made = |result: i32| match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    };
    // SAFETY: each call is given valid arguments; those that would do harm are not let through,
    // and if they were, only this process would be hurt.
    let outcome = unsafe {
        match what.as_str() {
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
        Ok(()) => 0,
        Err(error) => error.raw_os_error().unwrap(),
    });
}

/// Does to a file what is done to one of a writable layer.
fn write_and_sync(file: &fs::File) -> io::Result<()> {
    let mut bytes = [7u8; 512];
    let piece = vm_memory::VolatileSlice::from(&mut bytes[..]);
    gather::write_all_at(file, &[piece, piece], 4096)?;
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

/// Starts the daemon as nobody, on layers only the starter may read.
#[test]
fn another_user_serves_what_only_the_starter_may_open() {
    const NOBODY: u32 = 65534;
    let (case, content) = disk::deep();
    let directory = tempfile::tempdir().unwrap();
    let (layers, run) = (
        directory.path().join("layers"),
        directory.path().join("run"),
    );
    for path in [&layers, &run] {
        fs::create_dir(path).unwrap();
    }
    let lowers: Vec<_> = case
        .layers
        .iter()
        .enumerate()
        .map(|(number, layer)| {
            let name = number.to_string();
            fs::copy(layer, layers.join(&name)).unwrap();
            serde_json::json!({ "file": name })
        })
        .collect();
    let (config, result) = (layers.join("config.v1.json"), layers.join("result"));
    let text = serde_json::json!({ "lowers": lowers, "resultFile": "result" });
    fs::write(&config, text.to_string()).unwrap();
    let nobody = NOBODY.to_string();
    let mut arguments = vec!["--user", &nobody, "--group", &nobody];
    arguments.extend(["--config", config.to_str().unwrap()]);
    let socket = run.join("s");
    arguments.extend(["--socket", socket.to_str().unwrap()]);
    if !rustix::process::geteuid().is_root() {
        let output = daemon::run(&arguments);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains("cannot become user 65534"), "{text}");
        assert!(fs::read_to_string(result).unwrap().starts_with("failed:"));
        return;
    }
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o711)).unwrap();
    fs::set_permissions(&layers, fs::Permissions::from_mode(0o700)).unwrap();
    chown(&run, Some(NOBODY), Some(NOBODY)).unwrap();

    let mut child = daemon::command().args(&arguments).spawn().unwrap();
    let start = Instant::now();
    let stream = loop {
        match UnixStream::connect(&socket) {
            Ok(stream) => break stream,
            Err(error) => assert!(start.elapsed() < PATIENCE, "{error}"),
        }
        assert_eq!(child.try_wait().unwrap(), None, "it runs");
        thread::sleep(Duration::from_millis(2));
    };
    let mut guest = Guest::boot(stream, Options::default()).expect("guest");
    guest.assert_reads(0, &content);
    let meta = fs::symlink_metadata(&socket).unwrap();
    assert_eq!((meta.uid(), meta.gid()), (NOBODY, NOBODY));
    assert_eq!(meta.mode() & 0o777, 0o600);
    let pid = Pid::from_child(&child);
    for status in statuses(pid) {
        let ids = [NOBODY.to_string().as_str(); 4].join("\t");
        assert_eq!(field(&status, "Uid"), ids);
        assert_eq!(field(&status, "Gid"), ids);
        assert_eq!(field(&status, "Groups").trim(), "");
    }
    kill_process(pid, Signal::TERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(!socket.exists(), "nobody could remove it");
    assert_eq!(fs::read(result).unwrap(), b"success");
}

#[test]
fn an_unknown_user_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("s");
    let (case, _) = disk::deep();
    let layer = case.layers[0].to_str().unwrap();
    let mut arguments = vec!["--socket", socket.to_str().unwrap(), "--layers", layer];
    arguments.extend(["--user", "no such user"]);
    let output = daemon::run(&arguments);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(
        text.contains("no such user") && text.contains("/etc/passwd"),
        "{text}"
    );
    assert!(!socket.exists());
    let lone = daemon::run(["--socket", "s", "--layers", layer, "--group", "0"]);
    assert_eq!(lone.status.code(), Some(2), "--group without --user");
}

/// A layer that is cut while it is mapped: the fault handler works inside, too.
#[test]
fn a_fault_in_a_cut_layer_is_survived_inside() {
    let (case, _) = disk::deep();
    let directory = tempfile::tempdir().unwrap();
    let layers: Vec<_> = case
        .layers
        .iter()
        .enumerate()
        .map(|(number, layer)| {
            let copy = directory.path().join(number.to_string());
            fs::copy(layer, &copy).unwrap();
            copy
        })
        .collect();
    let mut daemon = Daemon::serve(&layers);
    let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
    let read_all = |guest: &mut Guest| {
        (0..case.size / common::blk::SECTOR)
            .step_by(1024)
            .map(|sector| guest.request(0, common::blk::IN, sector, 4096).status)
            .filter(|status| *status != common::blk::OK)
            .count()
    };
    assert_eq!(read_all(&mut guest), 0);
    for layer in &layers {
        fs::File::options()
            .write(true)
            .open(layer)
            .unwrap()
            .set_len(512)
            .unwrap();
    }
    assert_ne!(read_all(&mut guest), 0, "what is gone cannot be read");
    daemon.assert_alive();
}
