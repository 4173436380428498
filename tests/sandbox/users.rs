//! The daemon as another user.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use ovbd_vhost::format::lsmt::Header;
use ovbd_vhost::format::lsmt::writable::Kind;
use ovbd_vhost::writable::{Paths, create};
use rustix::process::{Pid, Signal, kill_process};

use crate::{field, statuses};
use common::PATIENCE;
use common::daemon;
use common::disk;
use common::guest::{Guest, Options};
use uuid::Uuid;

/// Starts the daemon as the user `nobody`, on layers that only the user who starts it may read.
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
        assert!(text.contains("cannot switch to user 65534"), "{text}");
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
    assert!(!socket.exists(), "the user `nobody` could remove it");
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

/// Flushes and snapshots create files beside a writable layer. A directory in which the daemon's user cannot do that is
/// told at the start, and not by the first snapshot.
#[test]
fn a_directory_of_a_writable_layer_that_belongs_to_another_user_is_refused() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let paths = ["u.data", "u.index"].map(|name| directory.path().join(name));
    let header = Header {
        index_offset: 0,
        index_entries: 0,
        virtual_size: 1 << 20,
        uuid: Uuid::from_u128(7),
        parent_uuid: Uuid::nil(),
        message: Vec::new(),
    };
    let [data, index] = paths.clone();
    create(&Paths { data, index }, Kind::Hybrid, &header).unwrap();
    for path in &paths {
        chown(path, Some(65534), Some(65534)).unwrap();
    }
    let upper = format!("data={},index={}", paths[0].display(), paths[1].display());
    let socket = directory.path().join("s");
    let output = daemon::run([
        "--upper",
        &upper,
        "--user",
        "65534",
        "--group",
        "65534",
        "--socket",
        socket.to_str().unwrap(),
    ]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    let folder = directory.path().display();
    let expected = format!("cannot create files in {folder}: Permission denied");
    assert!(text.contains(&expected), "{text}");
}
