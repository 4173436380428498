//! Log lines: their formats, and those that tell the life of a disk.

use common::daemon::{self, Daemon};
use common::disk;
use common::guest::{Guest, Options};
use serde_json::Value;

/// The lines of a daemon that a front-end used, and which was stopped.
fn lines_of_a_life(options: &[&str]) -> Vec<String> {
    let (case, content) = disk::deep();
    let mut daemon = Daemon::with(&case.layers, options);
    let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
    guest.assert_reads(0, &content);
    drop(guest);
    assert_eq!(daemon.terminate().code(), Some(0));
    daemon.log().lines().map(str::to_owned).collect()
}

/// Parts of the messages, in their order.
const LIFE: [&str; 4] = [
    "serving ",
    " uses the disk, with features 0x",
    "received a stop signal",
    "stopped",
];

fn assert_life<'a>(mut messages: impl Iterator<Item = &'a str> + Clone) {
    let mut rest = messages.clone();
    for part in LIFE {
        let found = rest.any(|message| message.contains(part));
        assert!(found, "{part:?} in {:?}", messages.collect::<Vec<_>>());
    }
    let us = format!("front-end of process {}, user ", std::process::id());
    assert!(messages.any(|message| message.contains(&us)), "{us}");
}

#[test]
fn text_is_the_default() {
    let lines = lines_of_a_life(&[]);
    assert!(
        lines.iter().all(|line| line.starts_with("[20")),
        "{lines:?}"
    );
    assert_life(lines.iter().map(String::as_str));
}

#[test]
fn json_is_an_object_a_line() {
    let lines = lines_of_a_life(&["--log-format", "json"]);
    let objects: Vec<Value> = lines
        .iter()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    for object in &objects {
        let keys: Vec<_> = object.as_object().expect("an object").keys().collect();
        assert_eq!(keys.len(), 4, "{object}");
        assert_eq!(object["level"], "info");
        assert!(object["time"].as_str().expect("text").ends_with('Z'));
        assert!(
            object["target"]
                .as_str()
                .expect("text")
                .starts_with("ovbd_vhost")
        );
    }
    assert_life(
        objects
            .iter()
            .filter_map(|object| object["message"].as_str()),
    );
}

#[test]
fn the_error_that_ends_a_program_is_json_too() {
    let arguments = [
        "--socket",
        "no/such/s",
        "--layers",
        "no-such-layer",
        "--log-format",
        "json",
    ];
    let output = daemon::run(arguments);
    assert_eq!(output.status.code(), Some(1));
    let error: Value = serde_json::from_slice(&output.stderr).expect("one object");
    assert_eq!(error["level"], "error");
    assert!(
        error["message"]
            .as_str()
            .expect("text")
            .contains("no-such-layer"),
        "{error}"
    );
}

#[test]
fn processes_that_are_started_use_the_same_format() {
    let cache = tempfile::tempdir().expect("a directory");
    let cache = cache.path().join("cache");
    let output = daemon::command()
        .args([
            "--socket",
            "s",
            "--image",
            "127.0.0.1:1/team/app:1",
            "--log-format",
            "json",
        ])
        .args(["--insecure-registry", "127.0.0.1:1", "--cache"])
        .arg(cache)
        .stderr(std::process::Stdio::piped())
        .spawn()
        .and_then(|mut child| {
            use std::io::{BufRead, BufReader};
            let mut line = String::new();
            let stderr = child.stderr.take().expect("a pipe");
            BufReader::new(stderr).read_line(&mut line)?;
            child.kill()?;
            child.wait()?;
            Ok(line)
        })
        .expect("a line");
    let line: Value = serde_json::from_str(&output).expect("one object");
    assert_eq!(line["level"], "warn");
    let message = line["message"].as_str().expect("text");
    assert!(message.contains("trying again for up to"), "{line}");
}
