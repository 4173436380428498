//! How the daemon starts: what it opens, in which order, and what it refuses before it is ready.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt, chown};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, Mode, mkfifoat};
use rustix::process::Pid;

use crate::{assert_confined, field, statuses};
use common::PATIENCE;
use common::daemon::{self, Daemon};
use common::disk;
use common::guest::{Guest, Options};
use common::programs;
use ovbd_vhost::format::lsmt::Header;
use ovbd_vhost::format::lsmt::writable::{Kind, encode_data_header};

const NOBODY: u32 = 65534;

/// A daemon that ends with the test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A file that begins as a writable layer and is held by another process, so that opening it as a
/// layer waits.
fn being_sealed(folder: &Path) -> File {
    let header = Header::empty(1 << 20, uuid::Uuid::from_u128(7), uuid::Uuid::nil());
    let file = File::create(folder.join("layer")).unwrap();
    let bytes = encode_data_header(&header, Kind::Hybrid);
    file.write_all_at(&bytes, 0).unwrap();
    file.set_len(1 << 16).unwrap();
    file.lock().unwrap();
    file
}

/// The daemon is looked at while it waits in the middle of parsing a layer.
#[test]
fn layers_are_parsed_inside_the_sandbox() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let held = being_sealed(folder.path());
    let text = serde_json::json!({ "lowers": [{ "file": "layer" }], "resultFile": "result" });
    fs::write(path("config"), text.to_string()).unwrap();
    let mut child = daemon::command()
        .arg("--socket")
        .arg(path("socket"))
        .arg("--config")
        .arg(path("config"))
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = Pid::from_child(&child);
    let start = Instant::now();
    let inside = || {
        let threads = statuses(pid);
        threads.iter().all(|status| field(status, "Seccomp") == "2")
    };
    while !inside() {
        assert_eq!(child.try_wait().unwrap(), None, "it waits for the layer");
        assert!(start.elapsed() < PATIENCE, "it parses outside");
        thread::sleep(Duration::from_millis(2));
    }
    statuses(pid)
        .iter()
        .for_each(|status| assert_confined(status));
    assert!(!path("socket").exists(), "nothing to connect to yet");
    assert_eq!(fs::read_to_string(path("result")).unwrap(), "");
    drop(held);
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("cannot open the image"), "{text}");
    let result = fs::read_to_string(path("result")).unwrap();
    assert!(
        result.starts_with("failed:cannot open the image"),
        "{result}"
    );
}

/// Root has no capability to read the files of others while it serves, but opens them.
#[test]
fn root_opens_a_writable_layer_of_another_user() {
    if !is_root() {
        return;
    }
    let (case, content) = disk::deep();
    let folder = tempfile::tempdir().unwrap();
    let upper = folder.path().join("upper");
    let option = ["--upper-auto", upper.to_str().unwrap()];
    drop(Daemon::with(&case.layers, &option));
    for file in fs::read_dir(&upper).unwrap() {
        let path = file.unwrap().path();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        chown(&path, Some(NOBODY), Some(NOBODY)).unwrap();
    }
    let daemon = Daemon::with(&case.layers, &option);
    let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
    guest.assert_reads(0, &content);
    statuses(daemon.pid())
        .iter()
        .for_each(|status| assert_confined(status));
}

/// The directory belongs to the user the daemon becomes, and the starter has no right to write in it.
#[test]
fn a_writable_layer_is_created_by_the_user_the_daemon_becomes() {
    if !is_root() {
        return;
    }
    let (case, _) = disk::deep();
    let folder = tempfile::tempdir().unwrap();
    let upper = folder.path().join("upper");
    fs::create_dir(&upper).unwrap();
    for path in [folder.path(), &upper] {
        chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
    }
    let user = NOBODY.to_string();
    let socket = folder.path().join("socket");
    let arguments = ["--upper-auto", upper.to_str().unwrap(), "--user", &user];
    let mut command = daemon::command();
    for layer in &case.layers {
        command.arg("--layers").arg(layer);
    }
    command.args(arguments).args(["--group", &user]);
    let mut child = Killed(command.arg("--socket").arg(&socket).spawn().unwrap());
    let start = Instant::now();
    let stream = loop {
        match std::os::unix::net::UnixStream::connect(&socket) {
            Ok(stream) => break stream,
            Err(error) => assert!(start.elapsed() < PATIENCE, "{error}"),
        }
        assert_eq!(child.0.try_wait().unwrap(), None, "it runs");
        thread::sleep(Duration::from_millis(2));
    };
    let mut guest = Guest::boot(stream, Options::default()).expect("guest");
    guest.write(0, 7, &[7; 4096]);
    guest.flush(0);
}

/// Runs the daemon, on the deep stack, under a limit of the system that `prlimit` sets.
fn limited(limit: &str, options: &[&str]) -> Output {
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let (case, _) = disk::deep();
    let mut command = Command::new("prlimit");
    command.arg(limit).arg(programs::path("ovbd-vhost"));
    for layer in &case.layers {
        command.arg("--layers").arg(layer);
    }
    let socket = folder.path().join("socket");
    let child = command
        .args(options)
        .arg("--socket")
        .arg(&socket)
        .stderr(Stdio::piped())
        .spawn();
    let mut child = child.expect("prlimit of util-linux");
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        // It is ready: it shall end.
        if socket.exists() {
            child.kill().unwrap();
        }
        assert!(start.elapsed() < PATIENCE, "it neither serves nor ends");
        thread::sleep(Duration::from_millis(2));
    }
    child.wait_with_output().unwrap()
}

#[track_caller]
fn assert_short(output: &Output, words: &[&str]) -> String {
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    for word in words {
        assert!(text.contains(word), "{word}: {text}");
    }
    text
}

#[test]
fn too_few_descriptors_for_all_queues_are_found_before_it_is_ready() {
    let output = limited("--nofile=200:200", &[]);
    assert_short(
        &output,
        &["256 queues", "RLIMIT_NOFILE", "allows 200", "--num-queues"],
    );
    // A soft limit is raised.
    let output = limited("--nofile=200:", &[]);
    assert_eq!(output.status.code(), None, "{output:?}");
}

/// What the message says is enough, for all queues at once.
#[test]
fn the_descriptors_asked_for_are_enough_for_all_queues() {
    const QUEUES: usize = 16;
    let options = ["--num-queues", "16"];
    let text = assert_short(&limited("--nofile=150:150", &options), &["16 queues need "]);
    let need = text.split("queues need ").nth(1).unwrap();
    let need = need.split(' ').next().unwrap();

    let (case, content) = disk::deep();
    let daemon = Daemon::with(&case.layers, &options);
    let limit: u64 = need.parse().unwrap();
    let limit = rustix::process::Rlimit {
        current: Some(limit),
        maximum: Some(limit),
    };
    let pid = Some(daemon.pid());
    rustix::process::prlimit(pid, rustix::process::Resource::Nofile, limit).unwrap();
    let options = Options {
        queues: QUEUES,
        ..Options::default()
    };
    let mut guest = Guest::boot(daemon.connect(), options).expect("guest");
    guest.assert_reads(0, &content);
    for queue in 0..QUEUES {
        let answer = guest.request(queue, common::blk::IN, 0, 4096);
        assert_eq!(answer.status, common::blk::OK, "queue {queue}");
    }
    assert!(daemon.count("fd") as u64 <= limit.current.unwrap());
}

#[test]
fn too_few_threads_for_all_queues_are_found_before_it_is_ready() {
    let user = ["--user", "54321", "--group", "54321"];
    let output = match is_root() {
        true => limited("--nproc=10:10", &user),
        false => limited("--nproc=10:10", &[]),
    };
    assert_short(&output, &["256 queues", "threads", "RLIMIT_NPROC"]);
}

#[test]
fn a_pipe_in_place_of_a_file_is_refused_and_not_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    mkfifoat(CWD, path("pipe"), Mode::RWXU).unwrap();
    let (socket, pipe) = (path("socket"), path("pipe"));
    let output = daemon::run(["--socket", &socket, "--config", &pipe]);
    assert_short(&output, &["cannot read", "not a regular file"]);
    let (case, _) = disk::deep();
    let text = serde_json::json!({
        "lowers": [{ "file": case.layers[0] }],
        "resultFile": pipe,
    });
    fs::write(path("config"), text.to_string()).unwrap();
    let output = daemon::run(["--socket", &socket, "--config", &path("config")]);
    assert_short(
        &output,
        &["cannot write the result file", "not a regular file"],
    );
}
