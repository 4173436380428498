//! Disks that are changed, resized and removed while they are used.

use std::thread;
use std::time::Duration;

use common::blk::{IN, SECTOR};
use common::guest::{Guest, Options};
use common::queue::Layout;
use serde_json::{Value, json};

use super::lifecycle::layer;
use super::node::{Node, kill, until};

const DAY: u64 = 86_400_000;

fn patch(node: &Node, id: &str, body: &Value) -> (u16, Value) {
    node.request("PATCH", &format!("/disks/{id}"), &body.to_string())
}

/// Offers a read without waiting for it.
fn offer(guest: &mut Guest) {
    let placed = guest.place(IN, 0, SECTOR as u32);
    guest.queues[0].submit(&placed.chain, Layout::Direct);
    guest.queues[0].publish();
}

#[test]
fn limits_are_set_changed_and_kept_over_restarts() {
    let mut node = Node::start();
    let ops = |size: u64| json!({ "ops": { "size": size, "refill_time": DAY } });
    let spec = json!({ "layers": [layer(&node, "a.obd", 7)], "limits": ops(2) });
    let (status, made) = node.put("/disks/a", &spec);
    assert_eq!(
        (status, &made["limits"]["ops"]["size"]),
        (201, &json!(2)),
        "{made}"
    );
    let free = json!({ "layers": [layer(&node, "a.obd", 7)] });
    assert_eq!(node.put("/disks/b", &free).0, 201);
    let mut guest = Guest::boot(node.connect("a"), Options::default()).unwrap();
    guest.read(0, 0, 512);
    guest.read(0, 0, 512);
    offer(&mut guest);
    // The limit of one disk does not concern another.
    let mut other = Guest::boot(node.connect("b"), Options::default()).unwrap();
    (0..50).for_each(|_| drop(other.read(0, 0, 512)));
    assert!(guest.queues[0].take().is_none(), "beyond the limit");
    let (status, changed) = patch(&node, "a", &json!({ "limits": ops(1) }));
    assert_eq!(
        (status, &changed["generation"]),
        (200, &json!(2)),
        "{changed}"
    );
    guest.queues[0].wait();
    offer(&mut guest);
    let text = node.get("!/metrics").1;
    let waited = "ovbd_throttled_requests_total{disk=\"a\",bucket=\"ops\"}";
    assert!(text.as_str().unwrap().contains(waited), "{text}");
    assert_eq!(
        patch(&node, "a", &json!({ "limits": { "ops": null } })).0,
        200
    );
    guest.queues[0].wait();
    drop(guest);
    // The state entry has the new limits.
    assert_eq!(patch(&node, "a", &json!({ "limits": ops(1) })).0, 200);
    let old = node.pid("a");
    node.kill();
    kill(old);
    node.start_again();
    until("another process serves", || {
        ![0, old].contains(&node.pid("a"))
    });
    node.until_state("a", "listening");
    let mut guest = Guest::boot(node.connect("a"), Options::default()).unwrap();
    guest.read(0, 0, 512);
    offer(&mut guest);
    thread::sleep(Duration::from_millis(20));
    assert!(guest.queues[0].take().is_none(), "beyond the limit");
    assert_eq!(
        node.put("/disks/a", &spec).0,
        409,
        "another specification by now"
    );
}

#[test]
fn a_patch_of_something_else_is_refused() {
    let node = Node::start();
    let layer = layer(&node, "a.obd", 7);
    let spec = json!({ "layers": [layer], "labels": { "vm": "one" } });
    assert_eq!(node.put("/disks/a", &spec).0, 201);
    let labels = json!({ "labels": { "vm": null, "team": "x" } });
    assert_eq!(
        patch(&node, "a", &labels).1["labels"],
        json!({ "team": "x" })
    );
    for (body, status, code) in [
        (json!({ "layers": [] }), 409, "immutable"),
        (json!({ "nothing": 1 }), 409, "immutable"),
        (
            json!({ "limits": { "ops": { "size": 0, "refill_time": 1 } } }),
            400,
            "bad_request",
        ),
        (
            json!({ "limits": { "op": null, "x": 1 } }),
            400,
            "bad_request",
        ),
        (json!({ "prefetch": "/etc/passwd" }), 400, "bad_request"),
        (json!([]), 400, "bad_request"),
    ] {
        let (got, answer) = patch(&node, "a", &body);
        assert_eq!(
            (got, answer["code"].as_str()),
            (status, Some(code)),
            "{body}: {answer}"
        );
    }
    assert_eq!(node.get("/disks/a").1["labels"], json!({ "team": "x" }));
    assert_eq!(patch(&node, "b", &labels).0, 404);
    for limits in [json!({ "ops": { "size": 1 } }), json!({ "bandwidth": 5 })] {
        let spec = json!({ "layers": [layer], "limits": limits });
        assert_eq!(node.put("/disks/c", &spec).0, 400, "{limits}");
    }
}

#[test]
fn a_disk_grows() {
    let node = Node::start();
    let upper = json!({ "dir": node.images().join("upper") });
    let spec = json!({ "layers": [layer(&node, "a.obd", 7)], "upper": upper });
    assert_eq!(node.put("/disks/a", &spec).0, 201);
    let size = |bytes: u64| node.put("/disks/a/size", &json!({ "bytes": bytes }));
    let (status, grown) = size(4 << 20);
    assert_eq!(
        (status, &grown["size_bytes"]),
        (200, &json!(4 << 20)),
        "{grown}"
    );
    assert_eq!(size(4 << 20).0, 200, "the same size again");
    let (status, refused) = size(1 << 20);
    assert_eq!(
        (status, &refused["code"]),
        (409, &json!("conflict")),
        "{refused}"
    );
    let old = node.pid("a");
    assert_eq!(node.request("POST", "/disks/a/restart", "").0, 200);
    until("another process serves", || {
        ![0, old].contains(&node.pid("a"))
    });
    node.until_state("a", "listening");
    assert_eq!(node.get("/disks/a").1["size_bytes"], 4 << 20);
    let events = node.get("/events").1;
    let kinds: Vec<_> = events["events"].as_array().unwrap().iter().collect();
    let resized = kinds.iter().filter(|event| event["event"] == "resized");
    assert_eq!(resized.count(), 1, "{events}");
    let readonly = json!({ "layers": [layer(&node, "a.obd", 7)] });
    assert_eq!(node.put("/disks/r", &readonly).0, 201);
    assert_eq!(
        node.put("/disks/r/size", &json!({ "bytes": 4 << 20 })).0,
        409
    );
    assert_eq!(
        node.put("/disks/none/size", &json!({ "bytes": 4 << 20 })).0,
        404
    );
}

#[test]
fn a_connected_disk_is_kept_unless_forced() {
    let node = Node::start();
    let spec = json!({ "layers": [layer(&node, "a.obd", 7)] });
    assert_eq!(node.put("/disks/a", &spec).0, 201);
    assert_eq!(node.get("/disks/a").1["front_end"], Value::Null);
    let guest = Guest::boot(node.connect("a"), Options::default()).unwrap();
    let (_, disk) = node.get("/disks/a");
    let front_end = &disk["front_end"];
    assert_eq!(front_end["pid"], std::process::id(), "{disk}");
    assert!(front_end["since"].as_u64() > Some(0) && front_end["features"].as_u64() > Some(0));
    let (status, refused) = node.request("DELETE", "/disks/a", "");
    assert_eq!(
        (status, &refused["code"]),
        (409, &json!("in_use")),
        "{refused}"
    );
    let pid = std::process::id().to_string();
    assert!(
        refused["error"].as_str().unwrap().contains(&pid),
        "{refused}"
    );
    assert_eq!(node.request("DELETE", "/disks/a?wait=0", "").0, 409);
    assert_eq!(node.request("DELETE", "/disks/a?wait=x", "").0, 400);
    thread::scope(|scope| {
        let waiting = scope.spawn(|| node.request("DELETE", "/disks/a?wait=60", "").0);
        drop(guest);
        assert_eq!(waiting.join().unwrap(), 204);
    });
    assert_eq!(node.put("/disks/a", &spec).0, 201);
    let _guest = Guest::boot(node.connect("a"), Options::default()).unwrap();
    assert_eq!(node.request("DELETE", "/disks/a?force=true", "").0, 204);
}
