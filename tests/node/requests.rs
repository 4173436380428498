//! Requests that make nothing: checks, conditions, pages, counters, images, and specifications.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;

use common::PATIENCE;
use common::guest::{Guest, Options};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::lifecycle::layer;
use super::node::{Node, kill, until};

/// Sends a request with one more header; returns the head and the body of the answer.
fn with_header(
    node: &Node,
    method: &str,
    path: &str,
    header: &str,
    body: &Value,
) -> (String, Value) {
    let body = match body {
        Value::Null => String::new(),
        body => body.to_string(),
    };
    let len = body.len();
    let text = node.exchange(&format!(
        "{method} /api/v1{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{header}\r\n\
         Content-Length: {len}\r\n\r\n{body}"
    ));
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let body = serde_json::from_str(body).unwrap_or_default();
    (head.to_lowercase(), body)
}

fn status(head: &str) -> u16 {
    head.split(' ').nth(1).unwrap().parse().unwrap()
}

#[test]
fn a_request_is_checked_and_nothing_is_made() {
    let node = Node::start();
    let spec = json!({ "layers": [layer(&node, "a.obd", 7)] });
    assert_eq!(node.put("/disks/a?validate=true", &spec).0, 204);
    assert_eq!(node.get("/disks/a").0, 404);
    assert_eq!(fs::read_dir(node.run_dir()).unwrap().count(), 0);
    let absent = json!({ "layers": [node.images().join("absent")] });
    let (status, refused) = node.put("/disks/a?validate=true", &absent);
    assert_eq!((status, &refused["code"]), (422, &json!("no_layer")));
    assert_eq!(node.put("/disks/a?validate=false", &spec).0, 201);
    assert_eq!(node.put("/disks/a?validate=true", &spec).0, 204);
    let other = json!({ "layers": [layer(&node, "b.obd", 8)] });
    let socket = node.get("/disks/a").1["socket"].clone();
    let taken = json!({ "layers": [layer(&node, "b.obd", 8)], "socket": socket });
    let fork = json!({ "from": { "disk": "absent", "snapshot": "s" } });
    for (path, spec, code) in [
        ("/disks/a?validate=true", &other, "conflict"),
        ("/disks/b?validate=true", &taken, "in_use"),
        ("/disks/b?validate=true", &fork, "not_found"),
        ("/disks/b?validate=1", &other, "bad_request"),
        ("/disks/b?valid=true", &other, "unknown_field"),
    ] {
        assert_eq!(node.put(path, spec).1["code"], code, "{path}");
    }
    assert_eq!(node.get("/disks/b").0, 404);
}

#[test]
fn conditions_are_held_against_the_generation() {
    let node = Node::start();
    let spec = json!({ "layers": [layer(&node, "a.obd", 7)] });
    let put = |header: &str| with_header(&node, "PUT", "/disks/a", header, &spec);
    assert_eq!(status(&put("If-Match: \"1\"").0), 412, "there is none");
    let (head, _) = put("If-None-Match: *");
    assert_eq!(status(&head), 201);
    assert!(
        head.contains("etag: \"1\"") && head.contains("location: /api/v1/disks/a"),
        "{head}"
    );
    let (head, refused) = put("If-None-Match: *");
    assert_eq!((status(&head), &refused["code"]), (412, &json!("changed")));
    assert_eq!(status(&put("If-Match: \"1\"").0), 200);

    let patch = json!({ "labels": { "a": "1" } });
    let change = |header: &str| with_header(&node, "PATCH", "/disks/a", header, &patch);
    let (head, changed) = change("If-Match: \"1\"");
    assert_eq!((status(&head), &changed["generation"]), (200, &json!(2)));
    assert!(head.contains("etag: \"2\""), "{head}");
    assert_eq!(status(&change("If-Match: \"1\"").0), 412);
    assert_eq!(status(&change("If-Match: 1").0), 400);
    let restart = |header| with_header(&node, "POST", "/disks/a/restart", header, &Value::Null);
    assert_eq!(status(&restart("If-Match: \"1\"").0), 412);
    let (head, _) = with_header(
        &node,
        "GET",
        "/disks/a",
        "If-None-Match: \"2\"",
        &Value::Null,
    );
    assert_eq!(status(&head), 200, "a read is answered in full");
    assert!(head.contains("x-request-id: "), "{head}");
    let delete = |header| with_header(&node, "DELETE", "/disks/a", header, &Value::Null);
    assert_eq!(status(&delete("If-Match: \"1\"").0), 412);
    assert_eq!(status(&delete("If-Match: \"2\"").0), 204);
}

#[test]
fn disks_are_listed_page_by_page() {
    let node = Node::start();
    let layer = layer(&node, "a.obd", 7);
    for number in 0..7 {
        let labels = json!({ "odd": (number % 2).to_string(), "a b": "c=+d" });
        let spec = json!({ "layers": [layer], "labels": labels });
        assert_eq!(node.put(&format!("/disks/d{number}"), &spec).0, 201);
    }
    let ids = |query: &str| {
        let (status, page) = node.get(&format!("/disks?{query}"));
        assert_eq!(status, 200, "{page}");
        let disks = page["disks"].as_array().unwrap().iter();
        let ids: Vec<_> = disks
            .map(|disk| disk["id"].as_str().unwrap().to_owned())
            .collect();
        (ids, page["next"].as_str().map(str::to_owned))
    };
    let next = |id: &str| Some(id.to_owned());
    assert_eq!(
        ids("limit=3"),
        (vec!["d0".into(), "d1".into(), "d2".into()], next("d2"))
    );
    assert_eq!(ids("limit=3&after=d2").1, next("d5"));
    assert_eq!(ids("limit=3&after=d5"), (vec!["d6".into()], None));
    assert_eq!(ids("limit=7").1, None, "nothing follows");
    assert_eq!(ids("after=d55").0, ["d6"], "an id that no disk has");
    assert_eq!(
        ids("label=odd=1&limit=2"),
        (vec!["d1".into(), "d3".into()], next("d3"))
    );
    assert_eq!(ids("label=odd=1&label=a%20b=c%3D%2Bd&after=d3").0, ["d5"]);
    assert_eq!(ids("label=a+b=c%3D%2Bd").0.len(), 7);
    assert_eq!(ids("label=odd=1&label=odd=0").0.len(), 0);
    for query in [
        "limit=0",
        "limit=x",
        "limit=1&limit=2",
        "label=odd",
        "limits=1",
    ] {
        assert_eq!(node.get(&format!("/disks?{query}")).0, 400, "{query}");
    }
}

#[test]
fn counters_of_one_disk_are_those_of_the_metrics() {
    let node = Node::start();
    let upper = json!({ "dir": node.images().join("upper") });
    let spec = json!({ "layers": [layer(&node, "a.obd", 7)], "upper": upper });
    assert_eq!(node.put("/disks/a", &spec).0, 201);
    let mut guest = Guest::boot(node.connect("a"), Options::default()).unwrap();
    guest.write(0, 0, &[9; 4096]);
    drop(guest.read(0, 0, 512));
    // A read of the layer itself, not of what was written above it.
    drop(guest.read(0, 64, 512));
    let (status, stats) = node.get("/disks/a/stats");
    assert_eq!(status, 200, "{stats}");
    assert_eq!(stats["requests"]["read"]["ok"], 2, "{stats}");
    assert_eq!(stats["requests"]["write"]["bytes"], 4096);
    assert_eq!(
        (&stats["connected"], &stats["queues_active"]),
        (&json!(1), &json!(1))
    );
    assert_eq!(
        (&stats["layers_open"], &stats["upper_limit_bytes"]),
        (&json!(1), &Value::Null)
    );
    assert!(stats["image_table_bytes"].as_u64().unwrap() > 0, "{stats}");
    // Each number of the metrics of the disk that is no sum of others is in it.
    let (_, text) = node.get("!/metrics");
    for line in text.as_str().unwrap().lines() {
        let Some((name, rest)) = line.split_once("{disk=\"a\"} ") else {
            continue;
        };
        let name = name.trim_end_matches("_total").trim_start_matches("ovbd_");
        let name = name.trim_start_matches("disk_");
        let value: f64 = rest.parse().unwrap();
        assert_eq!(stats[name].as_f64(), Some(value), "{line}: {stats}");
    }
    assert_eq!(node.get("/disks/none/stats").0, 404);
}

#[test]
fn images_have_the_disks_that_are_made_of_them() {
    let node = Node::start();
    let (a, b) = (layer(&node, "a.obd", 7), layer(&node, "b.obd", 8));
    for (id, layer) in [("one", &a), ("two", &a), ("three", &b)] {
        assert_eq!(
            node.put(&format!("/disks/{id}"), &json!({ "layers": [layer] }))
                .0,
            201
        );
    }
    let (_, images) = node.get("/images");
    let images = images["images"].as_array().unwrap().clone();
    assert_eq!(images.len(), 2);
    let key = node.get("/disks/one").1["image"].clone();
    let shared = images.iter().find(|image| image["key"] == key).unwrap();
    assert_eq!(shared["disks"], json!(["one", "two"]));
    let (status, image) = node.get(&format!("/images/{}", key.as_str().unwrap()));
    assert_eq!(status, 200, "{image}");
    let len = fs::metadata(&a).unwrap().len();
    let layers = json!([{ "layer": a, "bytes": len, "local_bytes": len }]);
    assert_eq!(image["layers"], layers);
    assert!(image["table_bytes"].as_u64().unwrap() > 0, "{image}");
    let (status, refused) = node.get("/images/none");
    assert_eq!((status, &refused["code"]), (404, &json!("not_found")));
}

#[test]
fn another_node_makes_the_same_disks_from_the_specifications() {
    let node = Node::start();
    let images = node.images();
    let plain =
        json!({ "layers": [layer(&node, "a.obd", 7)], "serial": "one", "labels": { "x": "y" } });
    assert_eq!(node.put("/disks/a", &plain).0, 201);
    let writable =
        json!({ "layers": [layer(&node, "a.obd", 7)], "upper": { "dir": images.join("b") } });
    assert_eq!(node.put("/disks/b", &writable).0, 201);
    let fork = json!({ "from": { "disk": "b", "snapshot": "s" }, "upper": { "dir": images.join("c") },
        "limits": { "ops": { "size": 5, "refill_time": 100 } } });
    let (status, made) = node.put("/disks/c", &fork);
    assert_eq!(status, 201, "{made}");
    let (_, config) = node.get("/config");
    for id in ["a", "b", "c"] {
        assert_eq!(node.request("DELETE", &format!("/disks/{id}"), "").0, 204);
    }
    // The other node has other sockets, and may name the same files.
    let other = Node::start_with(&["--allow-dir", images.to_str().unwrap()]);
    // In any order: a fork does not need its origin.
    for disk in config["disks"].as_array().unwrap().iter().rev() {
        let path = format!("/disks/{}", disk["id"].as_str().unwrap());
        let (status, made) = other.put(&path, &disk["spec"]);
        assert_eq!(status, 201, "{made}");
    }
    assert_eq!(other.get("/config").1, config);
    assert_eq!(config["damaged"], json!([]));
}

/// The process of a disk is asked for some answers. While there is none, the code tells whether to try again.
#[test]
fn a_disk_without_a_process_tells_what_to_do() {
    let node = Node::start();
    let layer = layer(&node, "a.obd", 7);
    let spec = json!({ "layers": [layer] });
    assert_eq!(node.put("/disks/a", &spec).0, 201);
    let take = || node.request("POST", "/disks/a/snapshots", r#"{"name":"s"}"#);
    let grow = || node.request("PUT", "/disks/a/size", r#"{"bytes":8388608}"#);
    for (status, refused) in [take(), grow()] {
        assert_eq!(
            (status, &refused["code"]),
            (409, &json!("read_only")),
            "{refused}"
        );
    }
    // A process that does not end for now: the next one waits for its end.
    let pid = node.pid("a");
    kill_process(Pid::from_raw(pid).unwrap(), Signal::STOP).unwrap();
    kill(pid);
    fs::remove_file(&layer).unwrap();
    node.until_state("a", "failed");
    for (status, refused) in [take(), grow(), node.get("/disks/a/snapshots")] {
        assert_eq!(
            (status, &refused["code"]),
            (409, &json!("conflict")),
            "{refused}"
        );
        let text = refused["error"].as_str().unwrap();
        assert!(
            text.contains("restart or remove") && text.contains("a.obd"),
            "{text}"
        );
    }
    until("the list of failed disks", || {
        node.get("/health/ready").1["failed"] == json!(["a"])
    });
}

/// Clients that may only read have a socket of their own, whose mode and owner are options.
#[test]
fn the_second_socket_serves_reads_only() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ro.sock");
    let node = Node::start_with(&[
        "--control-ro",
        path.to_str().unwrap(),
        "--control-mode",
        "0606",
    ]);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&path), mode(&node.control())), (0o660, 0o606));
    let spec = json!({ "layers": [layer(&node, "a.obd", 7)] });
    assert_eq!(node.put("/disks/a", &spec).0, 201);
    let ask = |method: &str, path_of: &str| {
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let request =
            format!("{method} {path_of} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    };
    for path in [
        "/api/v1/disks/a",
        "/api/v1/health/live",
        "/metrics",
        "/api/v1/config",
    ] {
        assert!(ask("GET", path).starts_with("HTTP/1.1 200"), "{path}");
    }
    assert!(ask("HEAD", "/metrics").starts_with("HTTP/1.1 200"));
    for (method, path) in [
        ("DELETE", "/api/v1/disks/a?force=true"),
        ("PUT", "/api/v1/disks/b"),
        ("POST", "/api/v1/reload"),
        ("PATCH", "/api/v1/disks/a"),
    ] {
        let refused = ask(method, path);
        assert!(refused.starts_with("HTTP/1.1 405"), "{refused}");
        assert!(
            refused.contains("allow: GET") && refused.contains("--control"),
            "{refused}"
        );
    }
    assert_eq!(node.get("/disks/a").0, 200);
    drop(node);
}

#[test]
fn a_wrong_owner_of_a_control_socket_ends_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let ended = Node::command(dir.path())
        .args(["--control-owner", ":no-such-group"])
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(
        !ended.status.success() && said.contains("no-such-group"),
        "{said}"
    );
    assert!(!dir.path().join("control.sock").exists());
}
