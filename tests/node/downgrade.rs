//! State entries of a newer node, and logs that grow.

use std::fs;
use std::io::Write;

use common::guest::{Guest, Options};
use serde_json::{Value, json};

use super::lifecycle::layer;
use super::node::{Node, until};

fn alive(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')')
        .is_some_and(|(_, rest)| !rest.starts_with(" Z"))
}

/// Changes the state entry of a disk.
fn change(node: &Node, id: &str, change: impl FnOnce(&mut Value)) {
    let text = fs::read_to_string(node.state(id)).unwrap();
    let mut entry = serde_json::from_str(&text).unwrap();
    change(&mut entry);
    fs::write(node.state(id), entry.to_string()).unwrap();
}

/// The disk goes on, so that the newer node can be installed again; it is removed only if the client insists.
#[test]
fn an_entry_of_a_newer_node_spoils_its_disk_alone() {
    let mut node = Node::start();
    let spec = json!({ "layers": [layer(&node, "a.obd", 7)] });
    for id in ["good", "newer", "field"] {
        assert_eq!(node.put(&format!("/disks/{id}"), &spec).0, 201);
    }
    let mut guest = Guest::boot(node.connect("newer"), Options::default()).unwrap();
    let pid = node.pid("newer");
    node.kill();
    let written = fs::read_to_string(node.state("newer")).unwrap();
    change(&node, "newer", |entry| entry["spec"]["zone"] = json!("z1"));
    change(&node, "field", |entry| entry["zone"] = json!("z1"));
    node.start_again();
    for id in ["newer", "field"] {
        let (_, disk) = node.get(&format!("/disks/{id}"));
        assert_eq!(disk["state"], "failed", "{disk}");
        let reason = disk["error"].as_str().unwrap();
        assert!(
            reason.contains("zone") && reason.contains("newer ovbd-node"),
            "{reason}"
        );
    }
    node.until_state("good", "listening");
    assert_eq!(node.get("/config").1["damaged"], json!(["field", "newer"]));
    assert_eq!(guest.read(0, 0, 512), [7; 512], "the guest notices nothing");
    let (status, refused) = node.request("DELETE", "/disks/newer", "");
    assert_eq!(
        (status, &refused["code"]),
        (409, &json!("in_use")),
        "{refused}"
    );

    // The newer node finds its entry as it was.
    node.kill();
    fs::write(node.state("newer"), &written).unwrap();
    node.start_again();
    node.until_state("newer", "listening");
    assert_eq!(node.pid("newer"), pid);
    node.kill();
    change(&node, "newer", |entry| entry["spec"]["zone"] = json!("z1"));
    node.start_again();
    assert_eq!(node.request("DELETE", "/disks/newer?force=true", "").0, 204);
    until("its process has ended", || !alive(pid));
    assert_eq!(node.get("/disks/good").1["state"], "listening");
}

#[test]
fn a_log_is_bounded_and_that_of_the_process_before_is_kept() {
    let node = Node::start();
    let spec = json!({ "layers": [layer(&node, "a.obd", 7)] });
    assert_eq!(node.put("/disks/a", &spec).0, 201);
    let (log, old) = (node.run_dir().join("a.log"), node.run_dir().join("a.log.1"));
    // As the process does: through the descriptor that it has open.
    let stderr = format!("/proc/{}/fd/2", node.pid("a"));
    assert_eq!(
        fs::read_link(&stderr).unwrap(),
        fs::canonicalize(&log).unwrap()
    );
    let mut lines = fs::File::options().append(true).open(&log).unwrap();
    for number in 0..30_000 {
        writeln!(
            lines,
            "line {number} of a process that says too much, again and again"
        )
        .unwrap();
    }
    until("the log is emptied", || {
        fs::metadata(&log).unwrap().len() < 1 << 20
    });
    let kept = fs::read_to_string(&old).unwrap();
    assert_eq!(kept.len(), 1 << 20);
    assert!(kept.contains("line 29999 of"), "the last lines are kept");
    let flags = fs::read_to_string(format!("/proc/{}/fdinfo/2", node.pid("a"))).unwrap();
    let flags = flags
        .lines()
        .find_map(|line| line.strip_prefix("flags:"))
        .unwrap();
    let flags = u32::from_str_radix(flags.trim(), 8).unwrap();
    assert_ne!(flags & 0o2000, 0, "it appends: O_APPEND");
    fs::write(&log, "the last line of the first process\n").unwrap();
    let first = node.pid("a");
    assert_eq!(node.request("POST", "/disks/a/restart", "").0, 200);
    until("the next process serves", || {
        ![0, first].contains(&node.pid("a"))
    });
    assert!(
        fs::read_to_string(&old)
            .unwrap()
            .contains("the last line of the first")
    );
    node.until_state("a", "listening");
    assert_eq!(node.request("DELETE", "/disks/a", "").0, 204);
    assert_eq!(
        fs::read_dir(node.run_dir()).unwrap().count(),
        0,
        "nothing is left"
    );
}
