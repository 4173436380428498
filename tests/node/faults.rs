//! Nodes and disk processes that are killed, and state that is damaged.

use std::fs;
use std::path::Path;

use common::guest::{Guest, Options};
use common::layers::LayerBuilder;
use serde_json::json;

use super::node::{Node, kill, until};

fn layer(node: &Node) -> String {
    let path = node.images().join("a.obd");
    fs::write(&path, LayerBuilder::new(1 << 20).data(0, &[7; 512]).lsmt()).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn disks_outlive_the_node_and_are_found_again() {
    let mut node = Node::start();
    let spec = json!({ "layers": [layer(&node)] });
    for id in ["a", "b"] {
        assert_eq!(node.put(&format!("/disks/{id}"), &spec).0, 201);
    }
    let mut guest = Guest::boot(node.connect("a"), Options::default()).unwrap();
    let pids = [node.pid("a"), node.pid("b")];
    node.kill();
    let data = guest.read(0, 0, 512);
    assert_eq!(data, [7; 512], "the disk serves without a node");
    kill(pids[1]);
    node.start_again();
    node.until_state("a", "listening");
    node.until_state("b", "listening");
    assert_eq!(node.pid("a"), pids[0], "the same process");
    assert_ne!(node.pid("b"), pids[1], "a new process");
    assert_eq!(guest.read(0, 0, 512), [7; 512]);
    assert_eq!(node.put("/disks/a", &spec).0, 200);
    drop(guest);
    kill(pids[0]);
    until("another process serves", || {
        ![0, pids[0]].contains(&node.pid("a"))
    });
    node.until_state("a", "listening");
    let mut guest = Guest::boot(node.connect("a"), Options::default()).unwrap();
    assert_eq!(guest.read(0, 0, 512), [7; 512]);
    drop(guest);
    for id in ["a", "b"] {
        assert_eq!(
            node.request("DELETE", &format!("/disks/{id}?force=true"), "")
                .0,
            204
        );
    }
    assert_eq!(
        fs::read_dir(node.run_dir()).unwrap().count(),
        0,
        "nothing is left"
    );
}

#[test]
fn a_killed_disk_comes_back_on_the_same_listener() {
    let node = Node::start();
    assert_eq!(
        node.put("/disks/a", &json!({ "layers": [layer(&node)] })).0,
        201
    );
    let pid = node.pid("a");
    kill(pid);
    // Never refused: the node holds the listener too.
    let mut guest = Guest::boot(node.connect("a"), Options::default()).unwrap();
    assert_eq!(guest.read(0, 0, 512), [7; 512]);
    until("the restart is counted", || {
        node.get("/disks/a").1["restarts"] == 1
    });
    assert_ne!(node.pid("a"), pid);
    let before = node.pid("a");
    assert_eq!(node.request("POST", "/disks/a/restart", "").0, 200);
    until("another process serves", || {
        ![0, before].contains(&node.pid("a"))
    });
}

#[test]
fn a_disk_that_cannot_start_again_fails_alone_and_can_be_repaired() {
    let node = Node::start();
    let layer = layer(&node);
    let aside = format!("{layer}.aside");
    fs::copy(&layer, &aside).unwrap();
    assert_eq!(node.put("/disks/a", &json!({ "layers": [layer] })).0, 201);
    assert_eq!(node.put("/disks/b", &json!({ "layers": [aside] })).0, 201);
    fs::rename(&layer, format!("{layer}.gone")).unwrap();
    kill(node.pid("a"));
    node.until_state("a", "failed");
    let error = node.get("/disks/a").1["error"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    assert!(error.contains("a.obd"), "{error}");
    assert_eq!(node.get("/health/ready").1["failed"], json!(["a"]));
    assert_eq!(node.get("/disks/b").1["state"], "listening");
    fs::rename(format!("{layer}.gone"), &layer).unwrap();
    assert_eq!(node.request("POST", "/disks/a/restart", "").0, 200);
    node.until_state("a", "listening");
}

#[test]
fn a_process_that_keeps_ending_is_given_up() {
    let node = Node::start();
    assert_eq!(
        node.put("/disks/a", &json!({ "layers": [layer(&node)] })).0,
        201
    );
    let mut last = 0;
    for _ in 0..5 {
        until("a new process", || ![0, last].contains(&node.pid("a")));
        last = node.pid("a");
        kill(last);
    }
    node.until_state("a", "failed");
    assert!(!Path::new(&format!("/proc/{last}/exe")).exists());
}

#[test]
fn damage_to_an_entry_and_an_interrupted_removal_concern_one_disk() {
    let mut node = Node::start();
    let spec = json!({ "layers": [layer(&node)] });
    for id in ["good", "torn", "half"] {
        assert_eq!(node.put(&format!("/disks/{id}"), &spec).0, 201);
    }
    let (torn, half) = (node.pid("torn"), node.pid("half"));
    node.kill();
    fs::write(node.state("torn"), "{").unwrap();
    let mark = node.state("half").with_extension("deleting");
    fs::rename(node.state("half"), &mark).unwrap();
    node.start_again();
    node.until_state("good", "listening");
    let (_, broken) = node.get("/disks/torn");
    assert_eq!(broken["state"], "failed");
    assert!(
        broken["error"].as_str().unwrap().contains("damaged"),
        "{broken}"
    );
    until("the removal is finished", || {
        node.get("/disks/half").0 == 404
    });
    assert!(!Path::new(&format!("/proc/{half}/exe")).exists());
    assert!(!mark.exists());
    assert_eq!(node.request("DELETE", "/disks/torn", "").0, 204);
    assert_eq!(node.get("/disks/torn").0, 404);
    kill(torn);
}

#[test]
fn a_process_without_an_entry_is_ended() {
    let mut node = Node::start();
    assert_eq!(
        node.put("/disks/a", &json!({ "layers": [layer(&node)] })).0,
        201
    );
    let pid = node.pid("a");
    node.kill();
    // As if the node had been killed before it made the entry durable.
    fs::remove_file(node.state("a")).unwrap();
    node.start_again();
    assert_eq!(node.get("/disks/a").0, 404);
    until("the process is gone", || {
        !Path::new(&format!("/proc/{pid}/exe")).exists()
    });
    assert_eq!(
        fs::read_dir(node.run_dir()).unwrap().count(),
        0,
        "nothing is left"
    );
}
