//! Limits of the system that are reached: the disks before are not harmed, and room makes the next one succeed.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use common::guest::{Guest, Options};
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use serde_json::json;

use super::lifecycle::layer;
use super::node::{Node, kill, until};

fn assert_serves(node: &Node, id: &str) {
    let mut guest = Guest::boot(node.connect(id), Options::default()).unwrap();
    assert_eq!(guest.read(0, 0, 512)[0], 7);
}

#[test]
fn without_descriptors_the_next_disk_is_refused_by_name_of_the_limit() {
    let node = Node::start();
    let spec = json!({ "layers": [layer(&node, "a.obd", 7)] });
    assert_eq!(node.put("/disks/a", &spec).0, 201);
    let limit = |count: usize| {
        let limits = Rlimit {
            current: Some(count as u64),
            maximum: getrlimit(Resource::Nofile).maximum,
        };
        prlimit(Pid::from_raw(node.node_pid()), Resource::Nofile, limits).unwrap()
    };
    // One is for the connection of the request.
    let before = limit(node.count("fd") + 2);
    let (status, refused) = node.put("/disks/b", &spec);
    assert_eq!(
        (status, refused["code"].as_str()),
        (503, Some("limit")),
        "{refused}"
    );
    assert!(
        refused["causes"].to_string().contains("RLIMIT_NOFILE"),
        "{refused}"
    );
    assert_eq!(node.get("/disks/b").0, 404, "no half disk");
    assert_serves(&node, "a");
    // Nor can a process that ends be started again now; it is once there are descriptors.
    kill(node.pid("a"));
    until("its end is noticed", || {
        node.get("/disks/a").1["state"] != "listening"
    });
    std::thread::sleep(std::time::Duration::from_millis(100));
    limit(before.current.unwrap() as usize);
    node.until_state("a", "listening");
    assert_serves(&node, "a");
    assert_eq!(node.put("/disks/b", &spec).0, 201);
    assert_serves(&node, "b");
}

/// A node whose state directory is a file system of 64 KiB, and that directory as the test sees it.
fn on_small_storage() -> (Node, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    fs::create_dir(&state).unwrap();
    let node = Node::start_in(dir, |command| {
        let namespace = match rustix::process::geteuid().is_root() {
            true => "-m",
            false => "-Urm",
        };
        let script = format!(
            "mount -t tmpfs -o size=64k tmpfs {} && exec \"$@\"",
            state.display()
        );
        let mut wrapped = Command::new("unshare");
        wrapped
            .args([namespace, "sh", "-c", &script, "sh"])
            .arg(command.get_program())
            .args(command.get_args());
        *command = wrapped;
    });
    let root = format!("/proc/{}/root", node.node_pid());
    let seen = PathBuf::from(root + state.to_str().unwrap());
    (node, seen)
}

#[test]
fn on_full_storage_no_half_disk_is_made_and_disks_go_on() {
    let (node, state) = on_small_storage();
    let spec = json!({ "layers": [layer(&node, "a.obd", 7)] });
    for id in ["a", "b"] {
        assert_eq!(node.put(&format!("/disks/{id}"), &spec).0, 201);
    }
    assert!(
        fs::write(state.join("full"), vec![0; 1 << 17]).is_err(),
        "it is full now"
    );
    let (status, refused) = node.put("/disks/c", &spec);
    assert_eq!(
        (status, refused["code"].as_str()),
        (507, Some("no_space")),
        "{refused}"
    );
    assert_eq!(node.get("/disks/c").0, 404);
    let left = fs::read_dir(node.run_dir()).unwrap().flatten();
    let of_c = left.filter(|file| file.file_name().to_string_lossy().starts_with("c."));
    assert_eq!(of_c.count(), 0, "nothing is left");
    // A disk that has to be restarted now is served all the same.
    let old = node.pid("a");
    kill(old);
    until("another process serves", || {
        ![0, old].contains(&node.pid("a"))
    });
    node.until_state("a", "listening");
    assert_serves(&node, "a");
    // A removal makes room.
    let (status, answer) = node.request("DELETE", "/disks/b?wait=60", "");
    assert_eq!(status, 204, "{answer}");
    assert_eq!(node.put("/disks/c", &spec).0, 201);
    assert_serves(&node, "c");
}

#[test]
fn a_process_that_the_entry_does_not_name_is_found_by_its_control_socket() {
    let mut node = Node::start();
    let spec = json!({ "layers": [layer(&node, "a.obd", 7)] });
    assert_eq!(node.put("/disks/a", &spec).0, 201);
    let pid = node.pid("a");
    node.kill();
    let entry = fs::read_to_string(node.state("a")).unwrap();
    let stale = entry.replace(&format!("\"pid\":{pid}"), "\"pid\":1");
    assert_ne!(entry, stale);
    // As if the storage had been full when the process was started again.
    fs::write(node.state("a"), stale).unwrap();
    node.start_again();
    node.until_state("a", "listening");
    assert_eq!(node.pid("a"), pid);
    assert_serves(&node, "a");
    fs::write(node.state("a"), entry).unwrap(); // for the end of the test, which kills it
}
