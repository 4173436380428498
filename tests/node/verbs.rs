//! `ovbd node`: each command against a running node.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Command, Output, Stdio};

use common::guest::{Guest, Options};
use common::layers::LayerBuilder;
use common::programs;
use serde_json::Value;

use super::node::Node;

fn command<A: AsRef<OsStr>>(node: &Node, arguments: &[A]) -> Command {
    let mut command = Command::new(programs::path("ovbd"));
    command
        .arg("node")
        .arg("--control")
        .arg(node.control())
        .args(arguments)
        // Paths on the command line are those of the tool, not of the node.
        .current_dir(node.images());
    command
}

fn run(node: &Node, arguments: &[&str]) -> Output {
    command(node, arguments).output().expect("the tool runs")
}

/// Runs a command that succeeds: its standard output.
fn succeed(node: &Node, arguments: &[&str]) -> String {
    let output = run(node, arguments);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && stderr.is_empty(),
        "{arguments:?}: {stderr}"
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Runs a command that fails with one line: the line.
fn fail(node: &Node, arguments: &[&str]) -> String {
    let output = run(node, arguments);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}");
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(
        stderr.starts_with("ovbd: ") && stderr.lines().count() == 1,
        "{stderr}"
    );
    stderr
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

fn with_layer() -> Node {
    let node = Node::start();
    let layer = LayerBuilder::new(1 << 20).data(0, &[7; 512]).lsmt();
    fs::write(node.images().join("a.obd"), layer).unwrap();
    node
}

#[test]
fn disks_are_made_listed_forked_and_removed() {
    let node = with_layer();
    let add = [
        "add", "vm1", "--layers", "a.obd", "--upper", "up", "--label", "vm=one",
    ];
    let made = succeed(&node, &add);
    assert!(made.starts_with("vm1: listening, 1.00 MiB, /"), "{made}");
    assert_eq!(succeed(&node, &add), made, "the same disk");
    let other = fail(&node, &["add", "vm1", "--layers", "a.obd"]);
    assert!(other.contains("(409 conflict)"), "{other}");
    let mut guest = Guest::boot(node.connect("vm1"), Options::default()).unwrap();
    guest.write(0, 0, &[9; 512]);
    succeed(&node, &["fork", "vm1", "vm2"]);
    guest.write(0, 0, &[10; 512]);
    let mut fork = Guest::boot(node.connect("vm2"), Options::default()).unwrap();
    assert_eq!(fork.read(0, 0, 512), [9; 512]);
    drop(fork);

    let list = succeed(&node, &["list"]);
    let lines: Vec<_> = list.lines().collect();
    assert_eq!(lines.len(), 3, "{list}");
    assert!(
        lines[0].starts_with("DISK  STATE          SIZE  AGE"),
        "{list}"
    );
    assert!(lines[1].contains("1 layer, writable"), "{list}");
    let end = |line: &str, word: &str| line.find(word).unwrap() + word.len();
    assert_eq!(end(lines[0], "SIZE"), end(lines[1], "1.00 MiB"), "{list}");
    let labelled = json(&succeed(&node, &["list", "--label", "vm=one", "--json"]));
    assert_eq!(
        labelled["disks"].as_array().map(Vec::len),
        Some(1),
        "{labelled}"
    );
    assert_eq!(labelled["disks"][0]["id"], "vm1");

    drop(guest);
    assert_eq!(
        succeed(&node, &["rm", "vm2", "vm1"]),
        "vm2: removed\nvm1: removed\n"
    );
    let gone = fail(&node, &["rm", "vm1"]);
    assert!(gone.contains("(404 not_found)"), "{gone}");
    assert_eq!(succeed(&node, &["list"]).lines().count(), 1);
}

#[test]
fn snapshots_and_restarts_are_told() {
    let node = with_layer();
    succeed(&node, &["add", "a", "--layers", "a.obd", "--upper", "up"]);
    let taken = succeed(&node, &["snapshot", "a", "first", "--wait"]);
    assert_eq!(taken, "a: snapshot \"first\" of 2 layers, sealed\n");
    let again = json(&succeed(&node, &["snapshot", "a", "first", "--json"]));
    assert_eq!(again["sealed"], true);
    let list = succeed(&node, &["snapshots", "a"]);
    assert!(
        list.lines()
            .nth(1)
            .unwrap()
            .starts_with("first     yes     "),
        "{list}"
    );
    let all = json(&succeed(&node, &["snapshots", "a", "--json"]));
    assert_eq!(all[0]["uuid"], again["uuid"]);
    let before = node.pid("a");
    assert!(succeed(&node, &["restart", "a"]).starts_with("a: "));
    node.until_state("a", "listening");
    assert_ne!(node.pid("a"), before);
    let events = succeed(&node, &["events"]);
    let kinds: Vec<_> = events
        .lines()
        .map(|line| line.split_whitespace().nth(2))
        .collect();
    assert_eq!(&kinds[..2], [Some("added"), Some("snapshot")], "{events}");
    let second = succeed(&node, &["events", "--after", "1", "--json"]);
    assert_eq!(json(second.lines().next().unwrap())["number"], 2);
}

#[test]
fn followed_events_and_rates_are_printed_as_they_come() {
    let node = with_layer();
    let mut follow = command(&node, &["events", "--follow"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(follow.stdout.take().unwrap()).lines();
    succeed(&node, &["add", "a", "--layers", "a.obd"]);
    let line = lines.next().unwrap().unwrap();
    assert!(line.ends_with(" added"), "{line}");
    follow.kill().unwrap();
    follow.wait().unwrap();
    let rates = succeed(&node, &["top", "--interval", "1", "--count", "2"]);
    let lines: Vec<_> = rates.lines().collect();
    assert_eq!(lines.len(), 4, "{rates}");
    assert!(lines[0].starts_with("DISK  READS/s"), "{rates}");
    assert!(lines[1].starts_with("a "), "{rates}");
    let rates = json(&succeed(
        &node,
        &["top", "--interval", "1", "--count", "1", "--json"],
    ));
    assert_eq!(rates[0]["disk"], "a");
}

#[test]
fn a_node_that_is_not_there_and_wrong_usage_are_told() {
    let mut node = Node::start();
    for wrong in [
        &["add", "a"][..],
        &["add", "a", "--layers", "x", "--config", "y"],
        &["add", "a", "--layers", "x", "--label", "novalue"],
        &["limits", "a", "--ops", "0"],
        &["rm"],
    ] {
        assert_eq!(run(&node, wrong).status.code(), Some(2), "{wrong:?}");
    }
    let missing = fail(&node, &["add", "a", "--layers", "missing"]);
    assert!(
        missing.contains("(422 no_layer)") && missing.contains("missing"),
        "{missing}"
    );
    node.kill();
    let absent = fail(&node, &["list"]);
    assert!(absent.contains("is ovbd-node running"), "{absent}");
    fs::remove_file(node.control()).unwrap();
}
