//! Each field of a disk reaches its process, and is reported with the value that is in force.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use serde_json::{Value, json};

use super::lifecycle::layer;
use super::node::Node;

/// The command line of a disk's process.
fn command_line(node: &Node, id: &str) -> Vec<String> {
    let text = fs::read(format!("/proc/{}/cmdline", node.pid(id))).unwrap();
    let words = text.split(|byte| *byte == 0);
    words
        .map(|word| String::from_utf8_lossy(word).into_owned())
        .collect()
}

#[test]
fn fields_reach_the_process_and_are_reported() {
    let node = Node::start();
    let images = node.images();
    let trace = images.join("trace");
    fs::write(&trace, "").unwrap();
    let fields = json!({
        "serial": "a serial",
        "num_queues": 2,
        "queue_size": 256,
        "poll_us": 7,
        "block_cache": 1 << 20,
        "on_full": "pause",
        "takeover": "never",
        "upper_limit": 1 << 30,
        "labels": { "team": "a" },
        "limits": { "ops": { "size": 9, "refill_time": 1000, "one_time_burst": 0 }, "bandwidth": null },
        "socket": node.run_dir().canonicalize().unwrap().join("own.sock"),
        "socket_mode": "0666",
    });
    let mut spec = fields.clone();
    spec["layers"] = json!([layer(&node, "a.obd", 7)]);
    spec["upper"] = json!({ "dir": images.join("upper") });
    let (status, disk) = node.put("/disks/a", &spec);
    assert_eq!(status, 201, "{disk}");
    for (name, value) in fields.as_object().unwrap() {
        assert_eq!(&disk[name], value, "{name}");
    }
    let words = command_line(&node, "a");
    for option in [
        ["--serial", "a serial"],
        ["--num-queues", "2"],
        ["--queue-size", "256"],
        ["--poll-us", "7"],
        ["--block-cache", "1048576"],
        ["--on-full", "pause"],
        ["--takeover", "never"],
        ["--upper-limit", "1073741824"],
    ] {
        assert!(
            words.windows(2).any(|pair| pair == option),
            "{option:?}: {words:?}"
        );
    }
    let socket = fs::metadata(disk["socket"].as_str().unwrap()).unwrap();
    assert_eq!(socket.permissions().mode() & 0o777, 0o666);
}

#[test]
fn defaults_are_reported_and_need_not_be_repeated() {
    let node = Node::start();
    let layer = layer(&node, "a.obd", 7);
    let (_, disk) = node.put("/disks/a", &json!({ "layers": [layer] }));
    let defaults = json!({
        "num_queues": 256,
        "queue_size": 1024,
        "poll_us": 0,
        "block_cache": 0,
        "on_full": "error",
        "takeover": "peer",
        "upper_limit": null,
        "labels": {},
        "limits": { "ops": null, "bandwidth": null },
        "socket_mode": "0600",
        "socket_owner": null,
        "prefetch": null,
    });
    for (name, value) in defaults.as_object().unwrap() {
        assert_eq!(&disk[name], value, "{name}");
    }
    assert_eq!(disk["serial"].as_str().map(str::len), Some(20), "{disk}");
    let same =
        json!({ "layers": [layer], "takeover": "peer", "queue_size": 1024, "socket_mode": "600" });
    assert_eq!(node.put("/disks/a", &same).0, 200);
    let other = json!({ "layers": [layer], "takeover": "never", "serial": "x" });
    let (status, refused) = node.put("/disks/a", &other);
    assert_eq!((status, &refused["code"]), (409, &json!("conflict")));
    let text = refused["error"].as_str().unwrap();
    assert!(text.contains("other values of serial, takeover"), "{text}");
}

/// A request names the owner by number, so that no list of users decides. Only root can give a socket away.
#[test]
fn a_socket_has_its_owner_before_it_has_its_name() {
    let node = Node::start();
    let (uid, gid) = {
        let own = fs::metadata(node.run_dir()).unwrap();
        (own.uid(), own.gid())
    };
    let owner = match uid {
        0 => "4711:4712".to_owned(),
        _ => format!("{uid}:{gid}"),
    };
    let mut spec = json!({ "layers": [layer(&node, "a.obd", 7)], "socket_owner": owner });
    let (status, disk) = node.put("/disks/a", &spec);
    assert_eq!(
        (status, &disk["socket_owner"]),
        (201, &json!(owner)),
        "{disk}"
    );
    let socket = fs::metadata(disk["socket"].as_str().unwrap()).unwrap();
    assert_eq!(format!("{}:{}", socket.uid(), socket.gid()), owner);
    spec["socket_owner"] = json!("no-such-user");
    let (status, refused) = node.put("/disks/b", &spec);
    assert_eq!((status, &refused["code"]), (400, &json!("bad_request")));
    assert!(
        refused["error"].as_str().unwrap().contains("no-such-user"),
        "{refused}"
    );
}

/// A value that the disk process would refuse is refused by the node, with a code that blames the request.
#[test]
fn a_wrong_value_is_a_bad_request() {
    let node = Node::start();
    let dir = node.run_dir().canonicalize().unwrap();
    for (field, value) in [
        ("serial", json!("")),
        ("serial", json!("123456789012345678901")),
        ("num_queues", json!(0)),
        ("queue_size", json!(1000)),
        ("poll_us", json!(1_000_001)),
        ("block_cache", json!(1_u64 << 60)),
        ("socket", json!("relative.sock")),
        ("socket", json!(dir.join("absent/a.sock"))),
        ("socket", json!("/proc/a.sock")),
        ("socket_mode", json!("0888")),
        ("socket_owner", json!(":")),
        ("on_full", json!("wait")),
        ("takeover", json!("Peer")),
        ("upper", Value::from("/d")),
    ] {
        let mut spec = json!({ "layers": [layer(&node, "a.obd", 7)] });
        spec[field] = value.clone();
        let (status, refused) = node.put("/disks/a", &spec);
        assert_eq!(
            (status, &refused["code"]),
            (400, &json!("bad_request")),
            "{field} {value}: {refused}"
        );
        assert_eq!(node.get("/disks/a").0, 404, "{field}");
    }
    for (field, value) in [
        ("file", json!(true)),
        ("upper", json!({ "data": "/d", "index": "/i" })),
    ] {
        let spec = json!({ "layers": [layer(&node, "a.obd", 7)], field: value });
        let (status, refused) = node.put("/disks/a", &spec);
        assert_eq!(
            (status, &refused["code"]),
            (400, &json!("unknown_field")),
            "{field}: {refused}"
        );
    }
}
