//! Nodes that are killed at any moment: what was acknowledged stays.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Mutex;
use std::thread;

use common::PATIENCE;
use common::guest::{Guest, Options};
use serde_json::json;

use super::lifecycle::layer;
use super::node::{Node, until};

/// Disks of a round.
const DISKS: usize = 6;

/// Status of a request to a node that may be killed meanwhile; `None` without an answer.
fn ask(control: &Path, method: &str, id: &str, body: &str) -> Option<u16> {
    let mut stream = UnixStream::connect(control).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let len = body.len();
    let head = format!(
        "{method} /api/v1/disks/{id} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len}\r\n\r\n"
    );
    stream.write_all((head + body).as_bytes()).ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    text.split(' ').nth(1)?.parse().ok()
}

/// What a client knows of its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    There,
    Gone,
    /// The last request had no answer.
    Either,
}

#[test]
fn a_node_killed_at_any_moment_loses_nothing_that_it_acknowledged() {
    let mut node = Node::start();
    let spec = json!({ "layers": [layer(&node, "a.obd", 7)] });
    let body = spec.to_string();
    for round in 0..8 {
        let known = Mutex::new(BTreeMap::new());
        let control = node.control();
        thread::scope(|scope| {
            for number in 0..DISKS {
                let (known, control, body) = (&known, &control, &body);
                scope.spawn(move || {
                    let id = format!("disk-{number}");
                    for step in 0.. {
                        let put = step % 2 == 0;
                        // The guest of the last round may not have been noticed to be gone.
                        let (method, path, body) = match put {
                            true => ("PUT", id.clone(), body.as_str()),
                            false => ("DELETE", format!("{id}?wait=60"), ""),
                        };
                        let (now, go_on) = match ask(control, method, &path, body) {
                            Some(200 | 201) => (Known::There, true),
                            Some(204 | 404) => (Known::Gone, true),
                            None => (Known::Either, false),
                            Some(other) => panic!("{method} {id}: {other}"),
                        };
                        known.lock().unwrap().insert(id.clone(), now);
                        if !go_on {
                            return;
                        }
                    }
                });
            }
            // Another moment in each round; when exactly does not matter.
            thread::sleep(std::time::Duration::from_millis(30 + 37 * round));
            node.kill();
        });
        node.start_again();
        for (id, known) in known.into_inner().unwrap() {
            let exists = || node.get(&format!("/disks/{id}")).0 == 200;
            match known {
                Known::There => assert!(exists(), "round {round}: {id} is lost"),
                Known::Gone => assert!(!exists(), "round {round}: {id} is back"),
                Known::Either => {}
            }
            // A removal that was begun is finished, and all other disks are served.
            until("the disk is served or gone", || {
                let (status, disk) = node.get(&format!("/disks/{id}"));
                assert_ne!(disk["state"], "failed", "round {round}: {disk}");
                status == 404 || disk["state"] == "listening"
            });
            let (status, answer) = node.put(&format!("/disks/{id}"), &spec);
            assert!([200, 201].contains(&status), "round {round}: {answer}");
            let mut guest = Guest::boot(node.connect(&id), Options::default()).unwrap();
            assert_eq!(guest.read(0, 0, 512)[0], 7);
        }
    }
    for number in 0..DISKS {
        let (status, answer) = node.request("DELETE", &format!("/disks/disk-{number}?wait=60"), "");
        assert_eq!(status, 204, "{answer}");
    }
    let left = std::fs::read_dir(node.run_dir()).unwrap().flatten();
    let left: Vec<_> = left.collect();
    assert!(left.is_empty(), "{left:?}");
}
