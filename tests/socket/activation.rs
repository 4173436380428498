//! Sockets passed by a service manager, and what it is told.

use std::fs;
use std::io::{ErrorKind, Read};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread;

use common::PATIENCE;
use common::daemon;
use common::disk;
use common::guest::{Guest, Options};
use rustix::process::{Pid, Signal, kill_process};

/// The daemon with `passed` as descriptor 3, announced as `count` descriptors for `pid`, which the
/// shell it starts as expands.
fn command(passed: OwnedFd, count: &str, pid: &str, arguments: &[&str]) -> Command {
    let (case, _) = disk::deep();
    let plain = daemon::command();
    let mut command = Command::new("/bin/sh");
    command
        .arg("-c")
        .arg(format!(
            "exec 3<&0 </dev/null; export LISTEN_FDS={count} LISTEN_PID={pid}; exec \"$0\" \"$@\""
        ))
        .arg(plain.get_program())
        .args(arguments)
        .stdin(passed)
        .env_remove("NOTIFY_SOCKET");
    for layer in &case.layers {
        command.arg("--layers").arg(layer);
    }
    command
}

/// Runs a daemon that is to refuse what it is passed.
fn refused(passed: impl Into<OwnedFd>, count: &str, pid: &str, arguments: &[&str]) -> Output {
    let mut command = command(passed.into(), count, pid, arguments);
    let child = command.stderr(Stdio::piped()).spawn().unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    output
}

fn says(output: &Output, what: &str) {
    let text = String::from_utf8_lossy(&output.stderr);
    let last = text.lines().last().unwrap_or_default();
    assert!(last.contains(what), "{what:?} in {text}");
}

fn serve(listener: &UnixListener, arguments: &[&str]) -> Child {
    let passed = listener.try_clone().unwrap().into();
    command(passed, "1", "$$", arguments).spawn().unwrap()
}

fn stop(mut child: Child) {
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

fn connect(path: &Path) -> UnixStream {
    UnixStream::connect(path).expect("the socket listens")
}

#[test]
fn the_socket_outlives_the_daemons_that_serve_it() {
    let (_, content) = disk::deep();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    // One knows the socket's path, as a unit might; the others need not.
    for named in [None, Some(path.to_str().unwrap()), None] {
        // Before there is a daemon: the connection waits for it.
        let stream = connect(&path);
        let arguments: Vec<_> = named
            .into_iter()
            .flat_map(|path| ["--socket", path])
            .collect();
        let child = serve(&listener, &arguments);
        let mut guest = Guest::boot(stream, Options::default()).expect("guest");
        guest.assert_reads(0, &content);
        stop(child);
        assert!(path.exists(), "it is not the daemon's to remove");
    }
}

#[test]
fn a_front_end_connects_while_one_daemon_follows_another() {
    let (_, content) = disk::deep();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let mut first = serve(&listener, &[]);
    let stream = connect(&path);
    let mut connection = stream.try_clone().unwrap();
    let mut guest = Guest::boot(stream, Options::default()).expect("guest");
    guest.assert_reads(0, &content);
    kill_process(Pid::from_child(&first), Signal::TERM).unwrap();
    assert_eq!(connection.read(&mut [0]).unwrap(), 0, "the signal is heard");
    // What connects from here on is the next daemon's.
    let stream = connect(&path);
    let boot = thread::spawn(|| Guest::boot(stream, Options::default()).expect("guest"));
    assert_eq!(first.wait().unwrap().code(), Some(0));
    let second = serve(&listener, &[]);
    boot.join().unwrap().assert_reads(0, &content);
    stop(second);
}

#[test]
fn what_is_no_listening_stream_socket_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let what = "descriptor 3: expected a listening Unix stream socket, found something else";
    says(
        &refused(TcpListener::bind("127.0.0.1:0").unwrap(), "1", "$$", &[]),
        what,
    );
    says(
        &refused(UnixDatagram::bind(&path).unwrap(), "1", "$$", &[]),
        what,
    );
    let (one, _other) = UnixStream::pair().unwrap();
    says(&refused(one, "1", "$$", &[]), what);
    says(
        &refused(fs::File::open("/dev/null").unwrap(), "1", "$$", &[]),
        what,
    );
}

#[test]
fn announcements_that_are_wrong_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let (path, other) = (directory.path().join("s"), directory.path().join("other"));
    let listener = UnixListener::bind(&path).unwrap();
    let _other = UnixListener::bind(&other).unwrap();
    let passed = || listener.try_clone().unwrap();
    let environment =
        "LISTEN_FDS and LISTEN_PID: expected the number of open descriptors and a process";
    // Descriptor 4 is not open.
    says(&refused(passed(), "2", "$$", &[]), environment);
    says(&refused(passed(), "2", "$$", &[]), "found \"2\" and ");
    says(&refused(passed(), "one", "$$", &[]), environment);
    says(&refused(passed(), "1", "here", &[]), environment);
    says(
        &refused(passed(), "1", "here", &[]),
        "found \"1\" and \"here\"",
    );
    let two = refused(passed(), "2", "$$; exec 4<&3", &[]);
    says(&two, "expected 1 socket, found 2");
    // Meant for another process: as if there were none.
    says(&refused(passed(), "1", "1", &[]), "no socket");
    says(&refused(passed(), "0", "$$", &[]), "no socket");
    let named = ["--socket", other.to_str().unwrap()];
    says(
        &refused(passed(), "1", "$$", &named),
        "the socket that the service manager passed is not",
    );
    let named = ["--socket", "absent"];
    says(
        &refused(passed(), "1", "$$", &named),
        "the socket that the service manager passed is not",
    );
    assert!(path.exists() && other.exists());
}

#[test]
fn without_any_socket_it_is_wrong_usage() {
    let output = daemon::run(["--layers", "a.obd"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--socket"));
}

#[test]
fn the_service_manager_is_told_of_start_and_end() {
    let (case, _) = disk::deep();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("notify");
    let hidden = format!("ovbd-vhost-test-{}", std::process::id());
    let by_path = UnixDatagram::bind(&path).unwrap();
    let address = SocketAddr::from_abstract_name(&hidden).unwrap();
    let by_name = UnixDatagram::bind_addr(&address).unwrap();
    for (name, manager) in [
        (path.to_str().unwrap().to_owned(), by_path),
        (format!("@{hidden}"), by_name),
    ] {
        manager.set_read_timeout(Some(PATIENCE)).unwrap();
        let next = || {
            let mut text = [0; 64];
            let len = manager.recv(&mut text).expect("a message");
            String::from_utf8_lossy(&text[..len]).into_owned()
        };
        let socket = directory.path().join("s");
        let mut command = daemon::command();
        command
            .arg("--socket")
            .arg(&socket)
            .env("NOTIFY_SOCKET", &name);
        let child = command
            .arg("--layers")
            .arg(&case.layers[0])
            .spawn()
            .unwrap();
        assert_eq!(next(), "READY=1", "{name}");
        let mut stream = connect(&socket);
        stop(child);
        assert_eq!(next(), "STOPPING=1", "{name}");
        // No process is left to answer.
        let end = stream.read(&mut [0]).map_err(|error| error.kind());
        assert!(
            matches!(end, Ok(0) | Err(ErrorKind::ConnectionReset)),
            "{end:?}"
        );
    }
}
