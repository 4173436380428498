//! Many disks, many clients, and what they leave behind.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;

use common::PATIENCE;
use common::guest::{Guest, Options};
use serde_json::{Value, json};

use super::lifecycle::layer;
use super::node::Node;

/// A number from the environment, for longer runs.
fn number(variable: &str, default: usize) -> usize {
    let text = std::env::var(variable).ok();
    text.map_or(default, |text| text.parse().expect(variable))
}

fn delete(node: &Node, id: &str) {
    let (status, answer) = node.request("DELETE", &format!("/disks/{id}?wait=60"), "");
    assert_eq!(status, 204, "{answer}");
}

/// Asserts that the node holds what it held before, and that no file is left.
fn assert_nothing_left(node: &Node, descriptors: usize) {
    // A closed connection or a child that ended is noticed a little later.
    super::node::until("descriptors are closed", || node.count("fd") <= descriptors);
    super::node::until("children are gone", || node.children() == 0);
    let files = |path| fs::read_dir(path).unwrap().flatten().collect::<Vec<_>>();
    let left = files(node.run_dir());
    assert!(left.is_empty(), "{left:?}");
    let left = files(node.dir.path().join("state/disks"));
    assert!(left.is_empty(), "{left:?}");
    let metrics = node.get("!/metrics").1;
    assert!(!metrics.as_str().unwrap().contains("disk=\""), "{metrics}");
}

#[test]
fn five_hundred_disks_are_made_at_once_and_removed_at_once() {
    let count = number("OVBD_NODE_DISKS", 500);
    let node = Node::start();
    let before = node.count("fd");
    let spec = json!({ "layers": [layer(&node, "a.obd", 7)] });
    let ids: Vec<_> = (0..count).map(|number| format!("disk-{number}")).collect();
    thread::scope(|scope| {
        for id in &ids {
            let (node, spec) = (&node, &spec);
            scope.spawn(move || {
                let (status, made) = node.put(&format!("/disks/{id}"), spec);
                assert_eq!(
                    (status, &made["state"]),
                    (201, &json!("listening")),
                    "{made}"
                );
            });
        }
    });
    let disks = node.get("/disks").1;
    let states = disks["disks"].as_array().unwrap().iter();
    assert_eq!(
        states.filter(|disk| disk["state"] == "listening").count(),
        count
    );
    for id in [&ids[0], &ids[count - 1]] {
        let mut guest = Guest::boot(node.connect(id), Options::default()).unwrap();
        assert_eq!(guest.read(0, 0, 512)[0], 7);
    }
    let metrics = node.get("!/metrics").1;
    let metrics = metrics.as_str().unwrap();
    let sizes = metrics
        .lines()
        .filter(|line| line.starts_with("ovbd_disk_size_bytes{"));
    assert_eq!(sizes.count(), count);
    // The target for 500 disks.
    assert!(
        metrics.len() < 4096 * count.max(500),
        "{} bytes",
        metrics.len()
    );
    thread::scope(|scope| {
        for id in &ids {
            let node = &node;
            scope.spawn(move || node.request("DELETE", &format!("/disks/{id}?wait=60"), ""));
        }
    });
    assert_nothing_left(&node, before);
}

#[test]
fn cycles_leave_nothing_behind() {
    let node = Node::start();
    let spec = json!({ "layers": [layer(&node, "a.obd", 7)] });
    // The first one opens what stays open.
    assert_eq!(node.put("/disks/a", &spec).0, 201);
    delete(&node, "a");
    let (descriptors, threads) = (node.count("fd"), node.count("task"));
    for cycle in 0..number("OVBD_NODE_CYCLES", 60) {
        let id = format!("disk-{}", cycle % 3);
        let (status, made) = node.put(&format!("/disks/{id}"), &spec);
        assert_eq!(status, 201, "{made}");
        delete(&node, &id);
    }
    assert_nothing_left(&node, descriptors);
    // Threads that read files end after a while without work.
    assert!(
        node.count("task") <= threads + 16,
        "{} threads",
        node.count("task")
    );
}

#[test]
fn a_put_during_a_delete_makes_the_disk_again() {
    let node = Node::start();
    let spec = json!({ "layers": [layer(&node, "a.obd", 7)] });
    for _ in 0..5 {
        assert_eq!(node.put("/disks/a", &spec).0, 201);
        thread::scope(|scope| {
            let removed = scope.spawn(|| node.request("DELETE", "/disks/a", "").0);
            let (status, answer) = node.put("/disks/a", &spec);
            assert_eq!(removed.join().unwrap(), 204);
            let gone = node.get("/disks/a").0 == 404;
            assert!(
                status == 201 || (status == 200 && gone),
                "{status}: {answer}"
            );
        });
        // Whatever came first: asking again repairs it.
        assert!([200, 201].contains(&node.put("/disks/a", &spec).0));
        delete(&node, "a");
    }
}

#[test]
fn a_client_that_leaves_during_a_put_leaves_a_disk_or_none() {
    let node = Node::start();
    let spec = json!({ "layers": [layer(&node, "a.obd", 7)] }).to_string();
    let len = spec.len();
    let head = format!("PUT /api/v1/disks/a HTTP/1.1\r\nHost: x\r\nContent-Length: {len}\r\n\r\n");
    for part in [head.len() - 2, head.len() + 5, head.len() + len] {
        let mut stream = UnixStream::connect(node.control()).unwrap();
        stream
            .write_all(&(head.clone() + &spec).as_bytes()[..part])
            .unwrap();
        if part == head.len() + len {
            super::node::until("it has begun", || node.get("/disks/a").0 == 200);
        }
        drop(stream);
        let (status, answer) = node.put("/disks/a", &serde_json::from_str(&spec).unwrap());
        assert!([200, 201].contains(&status), "{answer}");
        assert_eq!(answer["state"], "listening", "{answer}");
        let mut guest = Guest::boot(node.connect("a"), Options::default()).unwrap();
        assert_eq!(guest.read(0, 0, 512)[0], 7);
        drop(guest);
        delete(&node, "a");
    }
    super::node::until("no process is left", || node.children() == 0);
    // One byte at a time.
    let mut stream = UnixStream::connect(node.control()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let request = head.replace("Host: x", "Host: x\r\nConnection: close") + &spec;
    for byte in request.bytes() {
        stream.write_all(&[byte]).unwrap();
    }
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 201"), "{answer}");
}

#[test]
fn silent_clients_keep_nobody_from_the_api() {
    let node = Node::start();
    let silent: Vec<_> = (0..200)
        .map(|_| UnixStream::connect(node.control()).unwrap())
        .collect();
    assert_eq!(node.get("/health/live").0, 200);
    let spec = json!({ "layers": [layer(&node, "a.obd", 7)] });
    assert_eq!(node.put("/disks/a", &spec).0, 201);
    // None had to be closed for that.
    let mut last = &silent[199];
    last.set_read_timeout(Some(PATIENCE)).unwrap();
    last.write_all(b"GET /api/v1/version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    last.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

#[test]
fn paths_that_lead_elsewhere_are_refused() {
    let node = Node::start();
    let images = node.images();
    layer(&node, "a.obd", 7);
    std::os::unix::fs::symlink("/etc/passwd", images.join("link")).unwrap();
    std::os::unix::fs::symlink("a.obd", images.join("inside")).unwrap();
    fs::create_dir(images.join("dir")).unwrap();
    let mode = rustix::fs::Mode::RWXU;
    rustix::fs::mkfifoat(rustix::fs::CWD, images.join("pipe"), mode).unwrap();
    let put = |path: &str| {
        let path = path.replace("IMAGES", images.to_str().unwrap());
        node.put("/disks/a", &json!({ "layers": [path] }))
    };
    for (path, status) in [
        ("IMAGES/link", 422),
        ("IMAGES/dir", 422),
        ("IMAGES/pipe", 422),
        ("IMAGES/../images/a.obd", 400),
        ("IMAGES", 400),
        ("a.obd", 400),
        ("/proc/self/fd/0", 400),
        ("IMAGES/a.obd\0", 422),
        ("", 400),
    ] {
        let (found, answer) = put(path);
        assert_eq!(found, status, "{path}: {answer}");
    }
    assert_eq!(put("IMAGES/inside").0, 201);
    let long =
        json!({ "layers": [images.join("a.obd")], "socket": format!("/tmp/{}", "x".repeat(150)) });
    let (status, refused) = node.put("/disks/b", &long);
    assert_eq!(
        (status, &refused["code"]),
        (400, &Value::from("bad_request")),
        "{refused}"
    );
}
