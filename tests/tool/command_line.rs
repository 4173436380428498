//! The daemon's command line: exit codes, what it says, and how it starts and stops.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;

use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, set_capabilities,
    set_capabilities_secure_bits,
};

use common::PATIENCE;
use common::daemon::{self, Daemon};
use common::disk;
use common::guest::{Guest, Options};

/// Asserts that the daemon could not serve: exit code 1, nothing on stdout, and on stderr one line
/// that holds every one of `words`.
fn assert_cannot_serve(output: &Output, words: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "one line: {stderr}");
    assert!(output.stdout.is_empty(), "stdout is for results");
    for word in words {
        assert!(stderr.contains(word), "{stderr} does not tell {word}");
    }
}

fn serve(socket: &Path, layers: &str) -> Output {
    daemon::run([
        "--socket",
        socket.to_str().expect("UTF-8"),
        "--layers",
        layers,
    ])
}

fn a_layer() -> String {
    disk::deep().0.layers[0].to_str().expect("UTF-8").to_owned()
}

#[test]
fn wrong_usage_ends_with_2() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let socket = directory
        .path()
        .join("s")
        .to_str()
        .expect("UTF-8")
        .to_owned();
    let layer = a_layer();
    let wrong: [&[&str]; 10] = [
        &[],
        &["--socket", &socket],
        &["--layers", &layer],
        &["--socket", &socket, "--layers"],
        &["--socket", &socket, "--layers", &layer, "--no-such-option"],
        &["--socket", &socket, "--layers", &layer, "surplus"],
        &[
            "--socket",
            &socket,
            "--layers",
            &layer,
            "--config",
            "config.v1.json",
        ],
        &["--socket", &socket, "--layers", &layer, "--num-queues", "0"],
        &[
            "--socket",
            &socket,
            "--layers",
            &layer,
            "--num-queues",
            "many",
        ],
        &[
            "--socket",
            &socket,
            "--layers",
            &layer,
            "--queue-size",
            "100",
        ],
    ];
    for arguments in wrong {
        let output = daemon::run(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {stderr}");
        assert!(!stderr.is_empty(), "{arguments:?} is not explained");
        assert!(!Path::new(&socket).exists());
    }
}

#[test]
fn help_and_version_end_with_0_on_stdout() {
    for option in ["--help", "--version"] {
        let output = daemon::run([option]);
        assert_eq!(output.status.code(), Some(0));
        assert!(!output.stdout.is_empty());
        assert!(output.stderr.is_empty());
    }
}

#[test]
fn layers_that_cannot_be_served_are_named_in_one_line() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let at = |name: &str| {
        directory
            .path()
            .join(name)
            .to_str()
            .expect("UTF-8")
            .to_owned()
    };
    let socket = directory.path().join("s");
    let good = a_layer();

    fs::write(at("empty"), b"").expect("file");
    fs::write(at("text"), b"not a layer at all\n".repeat(1000)).expect("file");
    fs::create_dir(at("directory")).expect("directory");
    for name in ["missing", "empty", "text", "directory"] {
        let bad = at(name);
        for layers in [
            bad.clone(),
            format!("{good},{bad}"),
            format!("{bad},{good}"),
        ] {
            assert_cannot_serve(&serve(&socket, &layers), &[&bad]);
            assert!(!socket.exists(), "no socket is left");
        }
    }

    let cut = at("cut");
    let whole = fs::read(&good).expect("layer");
    fs::write(&cut, &whole[..whole.len() / 2]).expect("file");
    assert_cannot_serve(&serve(&socket, &cut), &[&cut]);
}

/// Runs `body` without the capabilities that let root open anything; children have none either.
fn as_another_user<T: Send>(body: impl FnOnce() -> T + Send) -> T {
    let unprivileged = || {
        if rustix::process::geteuid().is_root() {
            set_capabilities_secure_bits(CapabilitiesSecureBits::NO_ROOT).expect("securebits");
            let none = CapabilitySet::empty();
            let sets = CapabilitySets {
                effective: none,
                permitted: none,
                inheritable: none,
            };
            set_capabilities(None, sets).expect("capabilities");
        }
        body()
    };
    // Both belong to the thread, and end with it.
    thread::scope(|scope| scope.spawn(unprivileged).join().expect("test"))
}

#[test]
fn a_layer_without_permission_is_named() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let layer = directory.path().join("secret");
    fs::copy(a_layer(), &layer).expect("copy");
    fs::set_permissions(&layer, fs::Permissions::from_mode(0o000)).expect("permissions");
    let socket = directory.path().join("s");
    let name = layer.to_str().expect("UTF-8");
    let output = as_another_user(|| {
        File::open(&layer).expect_err("only root may read it");
        serve(&socket, name)
    });
    assert_cannot_serve(&output, &[name, "ermission"]);
}

#[test]
fn a_config_that_cannot_be_read_is_named() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let socket = directory.path().join("s");
    let socket = socket.to_str().expect("UTF-8");
    let config = directory.path().join("config.v1.json");
    let name = config.to_str().expect("UTF-8");
    let run = || daemon::run(["--socket", socket, "--config", name]);
    assert_cannot_serve(&run(), &[name]);
    for text in [
        "",
        "{",
        "[]",
        "{\"lowers\": 7}",
        "{\"lowers\": [{\"file\": \"/no/such/layer\"}]}",
    ] {
        fs::write(&config, text).expect("config");
        let named = if text.contains("/no/such") {
            "/no/such/layer"
        } else {
            name
        };
        assert_cannot_serve(&run(), &[named]);
    }
}

#[test]
fn a_config_names_the_layers() {
    let (case, content) = disk::deep();
    let directory = tempfile::tempdir().expect("temporary directory");
    let lowers: Vec<_> = case
        .layers
        .iter()
        .map(|layer| serde_json::json!({ "file": layer }))
        .collect();
    let result = directory.path().join("result");
    let config = serde_json::json!({
        "repoBlobUrl": "",
        "lowers": lowers,
        "resultFile": result,
        "someKeyOfTomorrow": 1,
    });
    let path = directory.path().join("config.v1.json");
    fs::write(&path, config.to_string()).expect("config");
    let daemon = Daemon::with::<&Path>(&[], &["--config", path.to_str().expect("UTF-8")]);
    let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
    guest.assert_reads(0, &content);
    assert!(
        fs::read_to_string(&result)
            .expect("result file")
            .contains("success")
    );
}

#[test]
fn a_limit_without_a_writable_layer_is_refused() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = |name: &str| {
        directory
            .path()
            .join(name)
            .to_str()
            .expect("UTF-8")
            .to_owned()
    };
    let config = serde_json::json!({ "lowers": [{ "file": a_layer() }] });
    fs::write(path("config.v1.json"), config.to_string()).expect("config");
    for (option, value) in [
        ("--layers", a_layer()),
        ("--config", path("config.v1.json")),
    ] {
        let output = daemon::run([
            "--socket",
            &path("s"),
            "--upper-limit",
            "1G",
            option,
            &value,
        ]);
        assert_cannot_serve(&output, &["--upper-limit", "--upper-auto"]);
    }
}

#[test]
fn a_comma_list_and_repeated_options_are_the_same_stack() {
    let (case, content) = disk::deep();
    let layers = case.layers;
    let join = |part: &[std::path::PathBuf]| {
        let names: Vec<_> = part
            .iter()
            .map(|path| path.to_str().expect("UTF-8"))
            .collect();
        names.join(",")
    };
    let (bottom, top) = layers.split_at(10);
    let daemon = Daemon::serve(&[join(bottom), join(top)]);
    let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
    guest.assert_reads(0, &content);
}

#[test]
fn a_socket_in_use_by_a_live_daemon_is_left_alone() {
    let (case, content) = disk::deep();
    let daemon = Daemon::serve(&case.layers);
    let socket = daemon.socket();
    let name = socket.to_str().expect("UTF-8");
    assert_cannot_serve(&serve(&socket, &a_layer()), &[name]);
    let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
    guest.assert_reads(0, &content);
}

#[test]
fn a_stale_socket_is_replaced_and_other_files_are_not() {
    let (case, content) = disk::deep();
    let mut daemon = Daemon::serve(&case.layers);
    daemon.kill();
    assert!(daemon.socket().exists(), "a crash leaves the socket");
    daemon.restart();
    let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
    guest.assert_reads(0, &content);

    let directory = tempfile::tempdir().expect("temporary directory");
    let file = directory.path().join("precious");
    fs::write(&file, "data").expect("file");
    assert_cannot_serve(&serve(&file, &a_layer()), &[file.to_str().expect("UTF-8")]);
    assert_eq!(fs::read(&file).expect("file"), b"data");
    let nowhere = directory.path().join("no/such/directory/s");
    assert_cannot_serve(
        &serve(&nowhere, &a_layer()),
        &[nowhere.to_str().expect("UTF-8")],
    );

    // A socket that listens, though not of a daemon of ours.
    let taken = directory.path().join("taken");
    let _listener = UnixListener::bind(&taken).expect("socket");
    assert_cannot_serve(
        &serve(&taken, &a_layer()),
        &[taken.to_str().expect("UTF-8")],
    );
}

#[test]
fn sigterm_ends_with_0_and_removes_the_socket() {
    let (case, content) = disk::deep();
    let mut daemon = Daemon::serve(&case.layers);
    let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
    guest.assert_reads(0, &content);
    assert_eq!(
        daemon.terminate().code(),
        Some(0),
        "with a front-end connected"
    );
    assert!(!daemon.socket().exists());
    daemon.restart();
    assert_eq!(daemon.terminate().code(), Some(0), "without one");
    assert!(!daemon.socket().exists());
}

#[test]
fn readiness_is_told_when_the_socket_listens() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let notify = directory.path().join("notify");
    let socket = directory.path().join("s");
    let receiver = UnixDatagram::bind(&notify).expect("socket");
    receiver.set_read_timeout(Some(PATIENCE)).expect("socket");
    let mut child = daemon::command()
        .arg("--socket")
        .arg(&socket)
        .args(["--layers", &a_layer()])
        .env("NOTIFY_SOCKET", &notify)
        .stderr(Stdio::null())
        .spawn()
        .expect("start of the daemon");
    let mut told = String::new();
    while !told.lines().any(|line| line == "READY=1") {
        let mut buffer = [0; 4096];
        match receiver.recv(&mut buffer) {
            Ok(len) => told.push_str(&String::from_utf8_lossy(&buffer[..len])),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                break;
            }
        }
        told.push('\n');
    }
    let listens = std::os::unix::net::UnixStream::connect(&socket).is_ok();
    child.kill().expect("kill");
    child.wait().expect("child");
    assert!(told.contains("READY=1"), "{told}");
    assert!(listens);
}

#[test]
fn as_many_queues_as_asked_for() {
    let (case, content) = disk::deep();
    for count in [1, 3, 64] {
        let option = count.to_string();
        let daemon = Daemon::with(&case.layers, &["--num-queues", &option]);
        let options = Options {
            queues: count.min(8),
            ..Options::default()
        };
        let mut guest = Guest::boot(daemon.connect(), options).expect("guest");
        let queues =
            vhost::vhost_user::VhostUserFrontend::get_queue_num(&mut guest.session.frontend);
        assert_eq!(queues.expect("queues"), count as u64);
        for queue in 0..options.queues {
            guest.assert_reads(queue, &content);
        }
    }
}

/// Standard error may be a file on a full disk.
#[test]
fn an_error_that_cannot_be_printed_ends_with_1() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let missing = directory.path().join("missing/file");
    let missing = missing.to_str().expect("UTF-8");
    let programs: [(&str, &[&str]); 3] = [
        (
            env!("CARGO_BIN_EXE_ovbd-vhost"),
            &["--socket", missing, "--layers", missing],
        ),
        (env!("CARGO_BIN_EXE_ovbd"), &["inspect", missing]),
        (
            env!("CARGO_BIN_EXE_ovbd-node"),
            &[
                "--control",
                missing,
                "--state",
                missing,
                "--run-dir",
                missing,
            ],
        ),
    ];
    for (program, arguments) in programs {
        let full = File::options().write(true).open("/dev/full").expect("full");
        let mut command = Command::new(program);
        let status = command.args(arguments).stderr(full).status().expect("run");
        assert_eq!(status.code(), Some(1), "{program}");
    }
}
