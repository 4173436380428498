//! Disks that are made, found, forked and removed.

use std::fs;

use common::guest::{Guest, Options};
use common::layers::LayerBuilder;
use serde_json::{Value, json};

use super::node::{Node, until};

/// A layer whose first sector is `byte`.
pub fn layer(node: &Node, name: &str, byte: u8) -> String {
    let path = node.images().join(name);
    let bytes = LayerBuilder::new(1 << 20).data(0, &[byte; 512]).lsmt();
    fs::write(&path, bytes).unwrap();
    path.to_str().unwrap().to_owned()
}

fn first_byte(node: &Node, id: &str) -> u8 {
    let mut guest = Guest::boot(node.connect(id), Options::default()).unwrap();
    guest.read(0, 0, 512)[0]
}

#[test]
fn a_disk_is_made_once_listed_and_removed() {
    let node = Node::start();
    let spec = json!({ "layers": [layer(&node, "a.obd", 7)], "labels": { "vm": "one" } });
    let (status, made) = node.put("/disks/a", &spec);
    assert_eq!(
        (status, &made["state"]),
        (201, &json!("listening")),
        "{made}"
    );
    assert_eq!(made["size_bytes"], 1 << 20);
    assert_eq!(first_byte(&node, "a"), 7);
    let (status, again) = node.put("/disks/a", &spec);
    assert_eq!((status, &again["pid"]), (200, &made["pid"]));
    let other = json!({ "layers": [layer(&node, "b.obd", 8)] });
    let (status, refused) = node.put("/disks/a", &other);
    assert_eq!(
        (status, &refused["code"]),
        (409, &json!("conflict")),
        "{refused}"
    );
    assert_eq!(node.put("/disks/b", &other).0, 201);
    let ids = |answer: Value| -> Vec<Value> {
        answer["disks"]
            .as_array()
            .unwrap()
            .iter()
            .map(|disk| disk["id"].clone())
            .collect()
    };
    assert_eq!(ids(node.get("/disks").1), ["a", "b"]);
    assert_eq!(ids(node.get("/disks?label=vm=one").1), ["a"]);
    assert_eq!(node.request("DELETE", "/disks/a", "").0, 204);
    assert_eq!(node.request("DELETE", "/disks/a", "").0, 404);
    assert_eq!(node.get("/disks/a").0, 404);
    let left: Vec<_> = fs::read_dir(node.run_dir())
        .unwrap()
        .map(|file| file.unwrap().file_name())
        .collect();
    assert!(
        left.iter()
            .all(|name| name.to_str().unwrap().starts_with("b.")),
        "{left:?}"
    );
    assert!(!node.state("a").exists());
    assert_eq!(node.put("/disks/a", &spec).0, 201, "the name is free again");
    let (_, events) = node.get("/events?after=0&wait=0");
    let kinds: Vec<_> = events["events"]
        .as_array()
        .unwrap()
        .iter()
        .map(|event| event["event"].clone())
        .collect();
    assert_eq!(kinds, ["added", "added", "removed", "added"]);
    let (_, metrics) = node.get("!/metrics");
    let metrics = metrics.as_str().unwrap();
    for line in [
        "ovbd_disks{state=\"listening\"} 2",
        "ovbd_disk_size_bytes{disk=\"a\"} 1048576",
    ] {
        assert!(metrics.contains(line), "{line}: {metrics}");
    }
}

#[test]
fn eight_clients_that_ask_for_one_disk_get_the_same() {
    let node = Node::start();
    let spec = json!({ "layers": [layer(&node, "a.obd", 7)] });
    let answers: Vec<_> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| node.put("/disks/a", &spec)))
            .collect();
        clients
            .into_iter()
            .map(|client| client.join().unwrap())
            .collect()
    });
    let made = answers.iter().filter(|(status, _)| *status == 201).count();
    let there = answers.iter().filter(|(status, _)| *status == 200).count();
    assert_eq!((made, there), (1, 7), "{answers:?}");
    assert!(
        answers
            .iter()
            .all(|(_, disk)| disk["pid"] == answers[0].1["pid"])
    );
}

#[test]
fn a_running_disk_is_forked() {
    let node = Node::start();
    let uppers = node.images();
    let upper = |name: &str| json!({ "dir": uppers.join(name) });
    let spec = json!({ "layers": [layer(&node, "a.obd", 7)], "upper": upper("a") });
    assert_eq!(node.put("/disks/a", &spec).0, 201);
    let mut guest = Guest::boot(node.connect("a"), Options::default()).unwrap();
    guest.write(0, 0, &[9; 512]);
    for number in 0..3 {
        let from = json!({ "disk": "a", "snapshot": "s" });
        let fork = json!({ "from": from, "upper": upper(&format!("fork{number}")) });
        let (status, made) = node.put(&format!("/disks/fork{number}"), &fork);
        assert_eq!(status, 201, "{made}");
    }
    guest.write(0, 0, &[10; 512]);
    assert_eq!(first_byte(&node, "fork0"), 9);
    let mut other = Guest::boot(node.connect("fork1"), Options::default()).unwrap();
    other.write(0, 0, &[11; 512]);
    assert_eq!(first_byte(&node, "fork2"), 9);
    assert_eq!(guest.read(0, 0, 512)[0], 10);
    let (status, snapshots) = node.get("/disks/a/snapshots");
    assert_eq!(
        (status, snapshots.as_array().map(Vec::len)),
        (200, Some(1)),
        "{snapshots}"
    );
    let shared = json!({ "layers": [layer(&node, "a.obd", 7)], "upper": upper("a") });
    let (status, refused) = node.put("/disks/thief", &shared);
    assert_eq!(
        (status, &refused["code"]),
        (409, &json!("in_use")),
        "{refused}"
    );
}

#[test]
fn what_is_wrong_with_a_request_is_told() {
    let node = Node::start();
    fs::write(node.images().join("text"), "no layer").unwrap();
    let below = |name: &str| node.images().join(name).to_str().unwrap().to_owned();
    for (id, spec, status, code) in [
        (
            "x",
            json!({ "layers": ["/etc/passwd"] }),
            400,
            "bad_request",
        ),
        ("x", json!({ "layers": [below("absent")] }), 422, "no_layer"),
        ("x", json!({ "layers": [below("text")] }), 422, "no_layer"),
        (
            "x",
            json!({ "layer": [below("text")] }),
            400,
            "unknown_field",
        ),
        (
            "x",
            json!({ "from": { "disk": "none", "snapshot": "s" } }),
            404,
            "not_found",
        ),
        ("..", json!({}), 400, "bad_request"),
        ("%2e%2e", json!({}), 400, "bad_request"),
    ] {
        let (got, body) = node.put(&format!("/disks/{id}"), &spec);
        assert_eq!(
            (got, body["code"].as_str()),
            (status, Some(code)),
            "{id} {spec}: {body}"
        );
    }
    assert_eq!(node.get("/disks").1["disks"], json!([]), "nothing is left");
    assert_eq!(
        fs::read_dir(node.run_dir()).unwrap().count(),
        0,
        "nothing is left"
    );
    let huge = "x".repeat((1 << 20) + 1);
    assert_eq!(node.request("PUT", "/disks/x", &huge).0, 413);
    assert_eq!(node.request("POST", "/disks/x", "{}").0, 405);
    assert_eq!(node.get("/nowhere").0, 404);
    assert_eq!(node.request("HEAD", "/version", "").0, 200);
    let chunked = "PUT /api/v1/disks/x HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n";
    assert!(node.exchange(chunked).starts_with("HTTP/1.1 400"));
    let (status, description) = node.get("/openapi.yaml");
    assert!(status == 200 && description.as_str().unwrap().starts_with("openapi: 3.0.3"));
}

#[test]
fn a_waiting_client_hears_of_the_next_event() {
    let node = Node::start();
    let spec = json!({ "layers": [layer(&node, "a.obd", 7)] });
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| node.get("/events?after=0&wait=60").1);
        assert_eq!(node.put("/disks/a", &spec).0, 201);
        let events = waiting.join().unwrap();
        assert_eq!(events["events"][0]["event"], "added");
    });
    until("the disk is there", || node.get("/disks/a").0 == 200);
}
