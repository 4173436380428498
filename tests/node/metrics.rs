//! `GET /metrics` of the node and of a single disk.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};

use common::PATIENCE;
use common::blk;
use common::guest::{Guest, Options};
use common::layers::{LayerBuilder, Pack, zfile};
use common::registries;
use ovbd_vhost::engine::stats::PAGE_LEN;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use super::lifecycle::layer;
use super::node::{Node, kill, until};

/// Metrics of a node.
fn scrape(node: &Node) -> String {
    let (status, text) = node.get("!/metrics");
    assert_eq!(status, 200, "{text}");
    text.as_str().unwrap().to_owned()
}

/// The value of a sample; `None` if the text has no such sample.
fn value(text: &str, sample: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(sample));
    line.and_then(|line| line.strip_prefix(' ')?.parse().ok())
}

fn reads(text: &str, id: &str) -> f64 {
    let sample = format!("ovbd_requests_total{{disk=\"{id}\",op=\"read\",result=\"ok\"}}");
    value(text, &sample).unwrap_or_else(|| panic!("{sample} in {text}"))
}

/// Checks a text with Prometheus's own program.
fn assert_clean(text: &str) {
    let mut promtool = Command::new(registries::server_program("usr/bin/promtool"))
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = promtool.stdin.take().unwrap();
    stdin.write_all(text.as_bytes()).unwrap();
    drop(stdin);
    let output = promtool.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr) + String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.is_empty(), "{said}\n{text}");
}

#[test]
fn requests_are_counted_and_the_text_is_clean() {
    let node = Node::start();
    let odd = "a\"b\\c\nd.obd";
    let spec = json!({ "layers": [layer(&node, odd, 7)] });
    assert_eq!(node.put("/disks/a", &spec).0, 201);
    let upper = json!({ "dir": node.images().join("upper") });
    let spec = json!({ "layers": [layer(&node, "b.obd", 8)], "upper": upper });
    assert_eq!(node.put("/disks/b", &spec).0, 201);
    let mut guest = Guest::boot(node.connect("a"), Options::default()).unwrap();
    (0..5).for_each(|_| drop(guest.read(0, 0, 1024)));
    let mut writer = Guest::boot(node.connect("b"), Options::default()).unwrap();
    writer.write(0, 0, &[9; 4096]);
    writer.flush(0);
    let text = scrape(&node);
    assert_clean(&text);
    for (sample, expected) in [
        (
            "ovbd_requests_total{disk=\"a\",op=\"read\",result=\"ok\"}",
            5.0,
        ),
        ("ovbd_request_bytes_total{disk=\"a\",op=\"read\"}", 5120.0),
        ("ovbd_request_bytes_total{disk=\"b\",op=\"write\"}", 4096.0),
        (
            "ovbd_requests_total{disk=\"b\",op=\"flush\",result=\"ok\"}",
            1.0,
        ),
        ("ovbd_request_duration_seconds_count{op=\"read\"}", 5.0),
        (
            "ovbd_disk_request_duration_seconds_count{disk=\"b\",op=\"write\"}",
            1.0,
        ),
        ("ovbd_disk_connected{disk=\"a\"}", 1.0),
        ("ovbd_disk_queues_active{disk=\"a\"}", 1.0),
        ("ovbd_disk_size_bytes{disk=\"a\"}", f64::from(1 << 20)),
        ("ovbd_frontend_connections_total{disk=\"a\"}", 1.0),
        ("ovbd_disks{state=\"listening\"}", 2.0),
        ("ovbd_disk_info{disk=\"b\",image=\"", f64::NAN),
    ] {
        match expected.is_nan() {
            true => assert!(text.contains(sample), "{sample}: {text}"),
            false => assert_eq!(value(&text, sample), Some(expected), "{sample}: {text}"),
        }
    }
    assert!(value(&text, "ovbd_disk_upper_used_bytes{disk=\"b\"}").unwrap() >= 4096.0);
    assert!(text.contains("a\\\"b\\\\c\\nd.obd"), "{text}");
    drop(guest);
    until("the front-end is gone", || {
        value(&scrape(&node), "ovbd_disk_connected{disk=\"a\"}") == Some(0.0)
    });
    assert_eq!(node.request("HEAD", "!/metrics", ""), (200, "".into()));
    let openmetrics = "GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAccept: application/openmetrics-text\r\n\r\n";
    let text = node.exchange(openmetrics);
    assert!(
        text.contains("content-type: application/openmetrics-text") && text.ends_with("# EOF\n")
    );
}

#[test]
fn counters_go_on_over_restarts_and_sums_over_removals() {
    let mut node = Node::start();
    let spec = json!({ "layers": [layer(&node, "a.obd", 7)] });
    for id in ["a", "b"] {
        assert_eq!(node.put(&format!("/disks/{id}"), &spec).0, 201);
    }
    let read = |node: &Node, id: &str| {
        let mut guest = Guest::boot(node.connect(id), Options::default()).unwrap();
        (0..3).for_each(|_| drop(guest.read(0, 0, 512)));
    };
    read(&node, "a");
    read(&node, "b");
    let old = node.pid("a");
    kill(old);
    until("another process serves", || {
        ![0, old].contains(&node.pid("a"))
    });
    node.until_state("a", "listening");
    assert_eq!(reads(&scrape(&node), "a"), 3.0);
    read(&node, "a");
    let text = scrape(&node);
    assert_eq!(reads(&text, "a"), 6.0);
    let crashes = "ovbd_disk_restarts_total{disk=\"a\",reason=\"crash\"}";
    assert_eq!(value(&text, crashes), Some(1.0), "{text}");
    let all = "ovbd_request_duration_seconds_count{op=\"read\"}";
    assert_eq!(value(&text, all), Some(9.0));
    assert_eq!(node.request("DELETE", "/disks/b?wait=60", "").0, 204);
    let text = scrape(&node);
    assert_eq!(value(&text, all), Some(9.0), "the sum keeps what was");
    assert!(!text.contains("disk=\"b\""), "{text}");
    node.kill();
    node.start_again();
    node.until_state("a", "listening");
    assert_eq!(reads(&scrape(&node), "a"), 6.0, "counted by another node");
    assert_eq!(node.put("/disks/b", &spec).0, 201);
    assert_eq!(reads(&scrape(&node), "b"), 0.0, "a new disk of an old name");
}

#[test]
fn a_stopped_disk_process_delays_no_scrape() {
    let node = Node::start();
    let spec = json!({ "layers": [layer(&node, "a.obd", 7)] });
    assert_eq!(node.put("/disks/a", &spec).0, 201);
    let mut guest = Guest::boot(node.connect("a"), Options::default()).unwrap();
    guest.read(0, 0, 512);
    let pid = Pid::from_raw(node.pid("a")).unwrap();
    kill_process(pid, Signal::STOP).unwrap();
    assert_eq!(reads(&scrape(&node), "a"), 1.0);
    let (_, disk) = node.get("/disks/a");
    assert_eq!(disk["front_end"]["pid"], std::process::id(), "{disk}");
    let (status, refused) = node.request("DELETE", "/disks/a", "");
    assert_eq!((status, &refused["code"]), (409, &json!("in_use")));
    kill_process(pid, Signal::CONT).unwrap();
}

#[test]
fn a_hostile_page_spoils_its_own_disk_only() {
    let node = Node::start();
    let spec = json!({ "layers": [layer(&node, "a.obd", 7)] });
    for id in ["good", "evil"] {
        assert_eq!(node.put(&format!("/disks/{id}"), &spec).0, 201);
    }
    let mut guest = Guest::boot(node.connect("good"), Options::default()).unwrap();
    guest.read(0, 0, 512);
    let page = node.run_dir().join("evil.stats");
    let magic = fs::read(&page).unwrap()[..8].to_vec();
    let mut hostile = magic.clone();
    hostile.resize(PAGE_LEN as usize, 0xff);
    for bytes in [
        hostile.clone(),
        hostile[..2000].to_vec(),
        magic,
        vec![1; 4096],
        vec![],
    ] {
        // As a subverted disk process could do it: the file stays mapped.
        fs::write(&page, &bytes).unwrap();
        let text = scrape(&node);
        assert_clean(&text);
        assert_eq!(reads(&text, "good"), 1.0);
        assert_eq!(node.get("/disks").0, 200);
    }
    fs::remove_file(&page).unwrap();
    assert_eq!(reads(&scrape(&node), "good"), 1.0);
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &page,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    assert_eq!(reads(&scrape(&node), "good"), 1.0);
    assert_eq!(node.request("DELETE", "/disks/evil?force=true", "").0, 204);
}

#[test]
fn metrics_are_served_on_a_loopback_address_only() {
    let refused = Node::command(tempfile::tempdir().unwrap().path())
        .args(["--metrics-listen", "0.0.0.0:0"])
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(
        !refused.status.success() && said.contains("expected a loopback address"),
        "{said}"
    );

    // A free port, which another process could take meanwhile.
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let node = Node::start_with(&["--metrics-listen", &port.to_string()]);
    let ask = |request: &str| {
        let mut stream = TcpStream::connect(port).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let request = format!("{request} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    };
    assert!(ask("GET /metrics").contains("ovbd_disks{state=\"listening\"} 0"));
    assert!(ask("GET /api/v1/disks").starts_with("HTTP/1.1 404"));
    assert!(ask("DELETE /metrics").starts_with("HTTP/1.1 405"));
    drop(node);
}

/// The names in the tables of the section "Metrics" of docs/node.md.
fn documented() -> BTreeSet<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/node.md");
    let text = fs::read_to_string(path).unwrap();
    let (_, section) = text.split_once("\n## Metrics\n").unwrap();
    let (section, _) = section.split_once("\n## ").unwrap();
    let rows = section.lines().filter(|line| line.starts_with("| `"));
    let names = rows.flat_map(|row| row.split('|').nth(1).unwrap().split('`'));
    let names = names.map(str::trim).filter(|name| name.len() > 1);
    names.map(str::to_owned).collect()
}

/// A node with disks that have every metric.
#[test]
fn the_names_are_those_of_the_documentation() {
    let node = Node::start_with(&["--metrics-label", "team"]);
    let upper = json!({ "dir": node.images().join("upper") });
    let spec = json!({ "layers": [layer(&node, "a.obd", 7)], "upper": upper, "upper_limit": 1 << 30,
        "labels": { "team": "a\"b", "other": "x" } });
    assert_eq!(node.put("/disks/a", &spec).0, 201);
    let mut guest = Guest::boot(node.connect("a"), Options::default()).unwrap();
    drop(guest.read(0, 0, 512));
    let text = scrape(&node);
    assert_clean(&text);
    let types = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
    let served: BTreeSet<_> = types.map(str::to_owned).collect();
    assert_eq!(served, documented());
    assert!(
        text.contains("readonly=\"false\",label_team=\"a\\\"b\"} 1"),
        "{text}"
    );
}

#[test]
fn labels_have_names_of_their_own_in_the_metrics() {
    let refused = Node::command(tempfile::tempdir().unwrap().path())
        .args(["--metrics-label", "a.b", "--metrics-label", "a-b"])
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(
        !refused.status.success() && said.contains("label_a_b"),
        "{said}"
    );
}

#[test]
fn decoded_blocks_the_cache_and_discards_are_counted() {
    let node = Node::start();
    let content: Vec<u8> = (0..1 << 20).map(|at: u32| (at / 512) as u8).collect();
    let lsmt = LayerBuilder::new(1 << 20).data(0, &content).lsmt();
    fs::write(node.images().join("z.obd"), zfile(&lsmt, Pack::default())).unwrap();
    let upper = json!({ "dir": node.images().join("upper") });
    let spec =
        json!({ "layers": [node.images().join("z.obd")], "upper": upper, "block_cache": 64 << 10 });
    assert_eq!(node.put("/disks/a", &spec).0, 201);
    let mut guest = Guest::boot(node.connect("a"), Options::default()).unwrap();
    for round in 0..2 {
        for block in 0..256 {
            assert_eq!(
                guest.read(0, block * 8, 512),
                content[block as usize * 4096..][..512],
                "{round}"
            );
        }
        drop(guest.read(0, 255 * 8, 512));
    }
    let range = blk::range(16, 8, 0);
    assert_eq!(guest.send(0, blk::DISCARD, 0, &range), blk::OK);
    let stats = node.get("/disks/a/stats").1;
    let text = scrape(&node);
    let of = |name: &str| value(&text, &format!("{name}{{disk=\"a\"}}")).unwrap();
    let decoded = value(&text, "ovbd_blocks_decoded_total{disk=\"a\",codec=\"lz4\"}").unwrap();
    assert!(decoded >= 256.0, "{text}");
    assert_eq!(
        of("ovbd_block_cache_hits_total") + of("ovbd_block_cache_misses_total"),
        514.0
    );
    assert!(of("ovbd_block_cache_hits_total") >= 2.0, "{text}");
    assert!(of("ovbd_block_cache_evictions_total") > 0.0, "{text}");
    assert_eq!(of("ovbd_block_cache_limit_bytes"), 65536.0);
    assert!(
        (1.0..=65536.0).contains(&of("ovbd_block_cache_bytes")),
        "{text}"
    );
    let discarded = "ovbd_request_bytes_total{disk=\"a\",op=\"discard\"}";
    assert_eq!(value(&text, discarded), Some(4096.0));
    assert_eq!(stats["requests"]["discard"]["bytes"], 4096, "{stats}");
    assert_eq!(stats["blocks_decoded"]["lz4"].as_f64(), Some(decoded));
    let slots = |state: &str| {
        let sample = format!("ovbd_sigbus_slots{{disk=\"a\",state=\"{state}\"}}");
        value(&text, &sample).unwrap()
    };
    assert!(
        slots("used") >= 2.0 && slots("used") + slots("free") == 8192.0,
        "{text}"
    );
}

#[test]
fn faults_in_truncated_files_are_counted() {
    let node = Node::start();
    let path = layer(&node, "a.obd", 7);
    assert_eq!(node.put("/disks/a", &json!({ "layers": [path] })).0, 201);
    let mut guest = Guest::boot(node.connect("a"), Options::default()).unwrap();
    assert_eq!(guest.read(0, 0, 512), [7; 512]);
    let faults = || value(&scrape(&node), "ovbd_sigbus_total{disk=\"a\"}");
    assert_eq!(faults(), Some(0.0));
    // From the mapping, which is gone the next time.
    assert_eq!(guest.read(0, 0, 512), [7; 512]);
    fs::File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(0)
        .unwrap();
    assert_eq!(guest.request(0, blk::IN, 0, 512).status, blk::IOERR);
    assert_eq!(faults(), Some(1.0));
}
