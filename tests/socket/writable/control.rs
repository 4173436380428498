//! The control socket: snapshots of a device in use.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::{assert_disk, part};
use common::daemon::Daemon;
use common::disk::{Disk, deep};
use common::guest::{Guest, Options};
use common::writable::Writable;

/// A device that can be written to, with a control socket.
struct Controlled {
    disk: Writable,
    /// Where the control socket is.
    folder: TempDir,
}

fn serve() -> Controlled {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("control");
    let disk = Writable::serve_with(&["--control", socket.to_str().unwrap()]);
    Controlled { disk, folder }
}

/// Sends `text` to a control socket; returns the status and the body of the answer.
fn send(socket: &Path, text: &str) -> Option<(u16, Value)> {
    let mut stream = UnixStream::connect(socket).ok()?;
    stream.write_all(text.as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    Some((status, serde_json::from_str(body).unwrap()))
}

/// Asks what a control socket is for; returns the status and the body of the answer.
pub fn ask(socket: &Path, method: &str, path: &str, body: &str) -> Option<(u16, Value)> {
    let len = body.len();
    let text = format!("{method} {path} HTTP/1.1\r\nContent-Length: {len}\r\n\r\n{body}");
    send(socket, &text)
}

impl Controlled {
    fn socket(&self) -> PathBuf {
        self.folder.path().join("control")
    }

    fn get(&self, path: &str) -> Value {
        let (status, body) = ask(&self.socket(), "GET", path, "").unwrap();
        assert_eq!(status, 200, "{body}");
        body
    }

    fn snapshot(&self, name: &str) -> Value {
        self.ask_for(&json!({ "name": name }))
    }

    /// The same, once it is sealed.
    fn sealed(&self, name: &str) -> Value {
        self.ask_for(&json!({ "name": name, "wait": true }))
    }

    fn ask_for(&self, what: &Value) -> Value {
        let body = what.to_string();
        let (status, body) = ask(&self.socket(), "POST", "/api/v1/snapshots", &body).unwrap();
        assert_eq!(status, 200, "{body}");
        body
    }
}

fn layers(snapshot: &Value) -> Vec<PathBuf> {
    let layers = snapshot["layers"].as_array().unwrap();
    layers
        .iter()
        .map(|layer| layer.as_str().unwrap().into())
        .collect()
}

/// Fills `sectors` sectors from `sector` on with `fill`, on the disk and in `model`.
fn write(guest: &mut Guest, model: &mut [u8], sector: u64, sectors: u64, fill: u8) {
    let bytes = part(model, sector, sectors);
    bytes.fill(fill);
    guest.write(0, sector, bytes);
}

/// Asserts that the part of the disk that the tests write to reads as `model`.
fn assert_start(guest: &mut Guest, model: &[u8]) {
    assert_disk(guest, &model[..512 << 10]);
}

#[test]
fn a_snapshot_is_a_layer_for_others_and_the_guest_goes_on() {
    let mut controlled = serve();
    let mut model = controlled.disk.content.to_vec();
    let mut guest = controlled.disk.plain_guest();
    let mut taken = Vec::new();
    for round in 0..3_u8 {
        let start = u64::from(round) * 30;
        write(&mut guest, &mut model, start, 50, round + 1);
        let name = format!("round {round}");
        let mut snapshot = controlled.snapshot(&name);
        // As it will be.
        snapshot["sealed"] = json!(true);
        taken.push((snapshot.clone(), model.clone()));
        write(&mut guest, &mut model, start + 20, 50, round + 101);
        assert_eq!(controlled.sealed(&name), snapshot, "asked again");
        assert_start(&mut guest, &model);
    }
    let listed = controlled.get("/api/v1/snapshots");
    let summary = |snapshot: &Value| json!({ "name": snapshot["name"], "uuid": snapshot["uuid"], "layer": layers(snapshot).last(), "sealed": true, "taken": snapshot["taken"] });
    let expected: Vec<_> = taken
        .iter()
        .map(|(snapshot, _)| summary(snapshot))
        .collect();
    assert_eq!(listed, json!(expected));
    guest.flush(0);
    drop(guest);

    // Others open them while the device is in use, and write above them.
    for (snapshot, model) in &taken {
        let folder = tempfile::tempdir().unwrap();
        let upper = ["--upper-auto", folder.path().to_str().unwrap()];
        let fork = Daemon::with(&layers(snapshot), &upper);
        let mut guest = Guest::boot(fork.connect(), Options::default()).unwrap();
        let mut model = model.clone();
        assert_start(&mut guest, &model);
        write(&mut guest, &mut model, 7, 9, 200);
        assert_start(&mut guest, &model);
    }

    // The device starts again with the options it had, however it ended.
    let device = controlled.get("/api/v1/device");
    assert_eq!(device["frozen_uppers"], 3);
    for crash in [true, false] {
        match crash {
            true => controlled.disk.crash(),
            false => controlled.disk.stop_and_start(),
        }
        let mut guest = controlled.disk.plain_guest();
        assert_start(&mut guest, &model);
        write(&mut guest, &mut model, 400, 8, u8::from(crash) + 77);
        assert_eq!(controlled.get("/api/v1/snapshots"), listed);
        let again = controlled.get("/api/v1/device");
        assert_eq!(
            (&again["frozen_uppers"], &again["upper"]["data"]),
            (&json!(0), &device["upper"]["data"])
        );
    }
    assert_eq!(controlled.snapshot("round 1"), taken[1].0);
    controlled.snapshot("after");
    assert_disk(&mut controlled.disk.plain_guest(), &model);
}

/// More pieces than are looked up at a time, in two layers and below them.
#[test]
fn reads_in_many_pieces() {
    let controlled = serve();
    let mut model = controlled.disk.content.to_vec();
    let mut guest = controlled.disk.plain_guest();
    for sector in (0..1000).step_by(2) {
        write(&mut guest, &mut model, sector, 1, 1);
    }
    assert_start(&mut guest, &model);
    controlled.snapshot("every other");
    for sector in (0..1000).step_by(3) {
        write(&mut guest, &mut model, sector, 1, 2);
    }
    assert_start(&mut guest, &model);
}

#[test]
fn a_writing_guest_does_not_notice() {
    let controlled = serve();
    let mut model = controlled.disk.content.to_vec();
    let mut guest = controlled.disk.plain_guest();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut round = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                round += 1;
                let sector = round * 37 % 600;
                write(
                    &mut guest,
                    &mut model,
                    sector,
                    1 + round % 20,
                    round as u8 | 1,
                );
                if round.is_multiple_of(16) {
                    guest.flush(0);
                }
                if round.is_multiple_of(50) {
                    assert_start(&mut guest, &model);
                }
            }
            round
        });
        for number in 0..20 {
            controlled.snapshot(&number.to_string());
        }
        stop.store(true, Ordering::Relaxed);
        assert!(writer.join().unwrap() > 0);
    });
    assert_start(&mut guest, &model);
    assert_eq!(controlled.get("/api/v1/device")["frozen_uppers"], 20);
}

#[test]
fn killed_while_it_takes_a_snapshot() {
    let mut controlled = serve();
    let mut model = controlled.disk.content.to_vec();
    for round in 0..12_u64 {
        let mut guest = controlled.disk.plain_guest();
        write(&mut guest, &mut model, round * 11, 40, round as u8 + 1);
        guest.flush(0);
        write(&mut guest, &mut model, round * 11 + 5, 3, 255 - round as u8);
        let socket = controlled.socket();
        let body = format!("{{\"name\": \"{round}\"}}");
        let request = thread::spawn(move || ask(&socket, "POST", "/api/v1/snapshots", &body));
        thread::sleep(Duration::from_micros(round * 400));
        controlled.disk.crash();
        // An answer that came is one that holds; none is as good.
        let _ = request.join().unwrap();
        let mut guest = controlled.disk.plain_guest();
        assert_start(&mut guest, &model);
        let snapshot = controlled.snapshot(&round.to_string());
        let fork = Daemon::with(&layers(&snapshot), &[]);
        let mut guest = Guest::boot(fork.connect(), Options::default()).unwrap();
        assert_start(&mut guest, &model);
    }
}

#[test]
fn who_asks_wrongly_is_told_so() {
    let mut controlled = serve();
    let socket = controlled.socket();
    let mode = fs::metadata(&socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let long = format!("{{\"name\": \"{}\"}}", "x".repeat(129));
    for (method, path, body, expected) in [
        ("GET", "/", "", 404),
        ("GET", "/api/v2/device", "", 404),
        ("DELETE", "/api/v1/snapshots", "", 405),
        ("POST", "/api/v1/device", "", 405),
        ("POST", "/api/v1/snapshots", "", 400),
        ("POST", "/api/v1/snapshots", "{}", 400),
        ("POST", "/api/v1/snapshots", "{\"name\": 7}", 400),
        ("POST", "/api/v1/snapshots", "{\"name\": \"\"}", 400),
        ("POST", "/api/v1/snapshots", "{\"name\": \"a\\nb\"}", 400),
        (
            "POST",
            "/api/v1/snapshots",
            "{\"name\": \"a\", \"b\": 1}",
            400,
        ),
        ("POST", "/api/v1/snapshots", &long, 400),
    ] {
        let (status, answer) = ask(&socket, method, path, body).unwrap();
        assert_eq!(status, expected, "{method} {path} {body}: {answer}");
        assert!(answer["error"].is_string());
    }
    assert_eq!(send(&socket, "what?\r\n\r\n").unwrap().0, 400);
    let whole = "GET http://localhost/api/v1/device HTTP/1.1\r\nHost: localhost\r\n\r\n";
    assert_eq!(send(&socket, whole).unwrap().0, 200);
    // A client that sends more than is read is answered all the same.
    let much = "x".repeat(70_000);
    for (text, expected) in [
        (format!("GET / HTTP/1.1\r\nA: {much}\r\n\r\n"), 413),
        (
            format!("POST / HTTP/1.1\r\nContent-Length: 70000\r\n\r\n{much}"),
            413,
        ),
        (
            format!("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n{much}"),
            411,
        ),
        (format!("what? {much}"), 400),
    ] {
        let answer = send(&socket, &text).expect("an answer");
        assert_eq!(answer.0, expected, "{}: {}", &text[..40], answer.1);
    }
    assert!(
        controlled
            .get("/api/v1/snapshots")
            .as_array()
            .unwrap()
            .is_empty()
    );
    controlled.disk.daemon.assert_alive();
    assert!(controlled.disk.daemon.terminate().success());
    assert!(!socket.exists(), "the socket goes with the daemon");
}

/// Silent ones are sent away after 5 seconds: until then, others are served.
#[test]
fn a_silent_client_delays_no_other() {
    let controlled = serve();
    let mut silent: Vec<_> = (0..7)
        .map(|_| UnixStream::connect(controlled.socket()).unwrap())
        .collect();
    controlled.get("/api/v1/device");
    controlled.snapshot("one");
    for stream in &mut silent {
        stream.set_nonblocking(true).unwrap();
        let answer = stream.read(&mut [0; 100]);
        let answer = answer.expect_err("served before those that came first were sent away");
        assert_eq!(answer.kind(), ErrorKind::WouldBlock);
    }
    // More of them, and more than are served at a time: they are sent away, and it goes on.
    silent.extend((0..3).map(|_| UnixStream::connect(controlled.socket()).unwrap()));
    controlled.get("/api/v1/device");
    silent[0].set_nonblocking(false).unwrap();
    let mut answer = String::new();
    silent[0].read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
}

#[test]
fn the_log_does_not_grow_with_what_is_refused() {
    let controlled = serve();
    for _ in 0..300 {
        let path = format!("/{}", "x".repeat(1000));
        assert_eq!(ask(&controlled.socket(), "GET", &path, "").unwrap().0, 404);
    }
    let log = controlled.disk.daemon.log();
    let refused = log.lines().filter(|line| line.contains("404"));
    assert!((1..200).contains(&refused.count()), "{log}");
    assert!(log.len() < 100_000);
}

#[test]
fn the_tool_asks_for_people() {
    let controlled = serve();
    let ctl = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ovbd"));
        command.arg("ctl").arg(controlled.socket()).args(arguments);
        command.output().unwrap()
    };
    let json = |output: Output| -> Value {
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let uuid = json(ctl(&["snapshot", "one"]))["uuid"].clone();
    let snapshot = json(ctl(&["snapshot", "one", "--wait"]));
    assert_eq!(
        (&snapshot["uuid"], &snapshot["sealed"]),
        (&uuid, &json!(true))
    );
    assert_eq!(snapshot, controlled.snapshot("one"));
    assert_eq!(
        json(ctl(&["snapshots"])),
        controlled.get("/api/v1/snapshots")
    );
    assert_eq!(json(ctl(&["device"])), controlled.get("/api/v1/device"));
    let refused = ctl(&["snapshot", ""]);
    assert_eq!(refused.status.code(), Some(1));
    let text = String::from_utf8(refused.stderr).unwrap();
    assert!(text.contains("400") && text.lines().count() == 1, "{text}");
}

#[test]
fn a_read_only_device_has_nothing_to_freeze() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("control");
    let disk = Disk::serve_with(&["--control", socket.to_str().unwrap()]);
    let (status, _) = ask(&socket, "POST", "/api/v1/snapshots", "{\"name\": \"a\"}").unwrap();
    assert_eq!(status, 409);
    let (status, device) = ask(&socket, "GET", "/api/v1/device", "").unwrap();
    let (case, content) = deep();
    assert_eq!((status, &device["upper"]), (200, &Value::Null));
    assert_eq!(device["layers"], case.layers.len());
    assert_eq!(device["size_bytes"], content.len());
    drop(disk);
}
