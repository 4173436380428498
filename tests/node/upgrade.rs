//! Disk processes that are replaced under a guest, one or all, and by other programs.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use common::guest::{Guest, Options};
use common::layers::LayerBuilder;
use common::programs;
use common::survivor::Survivor;
use serde_json::{Value, json};

use super::node::{Node, until};

fn layer(node: &Node) -> Value {
    let path = node.images().join("a.obd");
    fs::write(&path, LayerBuilder::new(1 << 20).lsmt()).unwrap();
    json!([path])
}

fn events(node: &Node, kind: &str) -> usize {
    let (_, batch) = node.get("/events?after=0");
    let events = batch["events"].as_array().unwrap();
    events.iter().filter(|event| event["event"] == kind).count()
}

#[test]
fn all_processes_are_replaced_one_by_one_under_their_guests() {
    let node = Node::start();
    let layers = layer(&node);
    let ids = ["a", "b", "c"];
    for id in ids {
        let upper = json!({ "dir": node.images().join(format!("{id}.upper")) });
        let spec = json!({ "layers": layers, "upper": upper });
        assert_eq!(node.put(&format!("/disks/{id}"), &spec).0, 201);
    }
    let before = ids.map(|id| node.pid(id));
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for (seed, id) in (0..).zip(ids) {
            let (socket, stop) = (node.run_dir().join(format!("{id}.sock")), &stop);
            scope.spawn(move || {
                let mut guest = Survivor::start(socket, seed);
                while !stop.load(Ordering::Relaxed) {
                    guest.step();
                }
                guest.check_all();
                assert!(guest.reconnects > 0, "its process was replaced");
            });
        }
        for id in ids {
            until("a guest has the disk", || {
                !node.get(&format!("/disks/{id}")).1["front_end"].is_null()
            });
        }
        let (status, begun) = node.request("POST", "/reload", "");
        assert_eq!((status, &begun["disks"]), (202, &json!(3)), "{begun}");
        let (status, refused) = node.request("POST", "/reload", "");
        assert_eq!((status, &refused["code"]), (409, &json!("conflict")));
        until("all are replaced", || events(&node, "restarted") == 3);
        stop.store(true, Ordering::Relaxed);
    });
    for (id, before) in ids.into_iter().zip(before) {
        assert_ne!(node.pid(id), before);
    }
    until("a second reload may begin", || {
        node.request("POST", "/reload", "").0 == 202
    });
}

/// A guest keeps the features that it negotiated. A program that offers fewer must wait for it to leave.
#[test]
fn a_program_that_offers_fewer_features_does_not_replace_a_process_in_use() {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("ovbd-vhost");
    let real = programs::path("ovbd-vhost");
    let install = |features: &str| {
        let script = format!("#!/bin/sh\n{features}\nexec {} \"$@\"\n", real.display());
        let new = dir.path().join("new");
        fs::write(&new, script).unwrap();
        fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).unwrap();
        fs::rename(new, &program).unwrap();
    };
    install("");
    let node = Node::start_with(&["--program", program.to_str().unwrap()]);
    let layers = layer(&node);
    assert_eq!(node.put("/disks/a", &json!({ "layers": layers })).0, 201);
    let before = node.pid("a");
    let guest = Guest::boot(node.connect("a"), Options::default()).unwrap();
    install(
        "if [ \"$1\" = --print-features ]; then\n\
         echo '{\"read_only\": {\"features\": 5, \"protocol_features\": 0}}'; exit\nfi",
    );
    let (status, refused) = node.request("POST", "/disks/a/restart", "");
    assert_eq!(
        (status, &refused["code"]),
        (409, &json!("conflict")),
        "{refused}"
    );
    let text = refused["error"].as_str().unwrap();
    assert!(text.contains("of features"), "{text}");
    assert_eq!(node.pid("a"), before, "it keeps its process");
    drop(guest);
    until("the guest has left", || {
        node.get("/disks/a").1["front_end"].is_null()
    });
    assert_eq!(node.request("POST", "/disks/a/restart", "").0, 200);
    until("another process serves", || {
        ![0, before].contains(&node.pid("a"))
    });
}

/// Front-ends are reported by events, also those that were refused.
#[test]
fn front_ends_are_events() {
    let node = Node::start();
    let layers = layer(&node);
    let spec = json!({ "layers": layers, "takeover": "never" });
    assert_eq!(node.put("/disks/a", &spec).0, 201);
    let guest = Guest::boot(node.connect("a"), Options::default()).unwrap();
    until("it is reported", || events(&node, "connected") == 1);
    let _ = Guest::boot(node.connect("a"), Options::default());
    until("the refusal is reported", || {
        events(&node, "takeover_refused") == 1
    });
    drop(guest);
    until("its end is reported", || events(&node, "disconnected") == 1);
    let wrong = json!({ "layers": layers, "takeover": "sometimes" });
    assert_eq!(node.put("/disks/b", &wrong).0, 400);
}
