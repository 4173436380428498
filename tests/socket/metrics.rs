//! Metrics of a disk without a node, on its control socket.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::PATIENCE;
use common::blk::{IN, IOERR, OK};
use common::disk::Disk;
use common::guest::Options;
use common::registries::server_program;
use ovbd_vhost::engine::stats::DiskCell;
use ovbd_vhost::engine::stats::figures::Figures;
use ovbd_vhost::engine::stats::queue::Op;
use ovbd_vhost::tool::ctl::{Ask, ask};

fn exchange(control: &Path, request: &str) -> String {
    let mut stream = UnixStream::connect(control).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(stream, "{request}\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

fn serve(folder: &Path) -> (Disk, PathBuf) {
    let (control, stats) = (folder.join("control"), folder.join("stats"));
    let disk = Disk::serve_with(&[
        "--control",
        control.to_str().unwrap(),
        "--stats",
        stats.to_str().unwrap(),
        "--serial",
        "a\\b\"c",
    ]);
    (disk, control)
}

#[test]
fn a_disk_without_a_node_has_the_same_metrics() {
    let folder = tempfile::tempdir().unwrap();
    let (disk, control) = serve(folder.path());
    let device = || ask(&control, &Ask::Device).unwrap();
    assert!(device()["front_end"].is_null());
    let mut guest = disk.guest(Options::default());
    for _ in 0..3 {
        assert_eq!(guest.request(0, IN, 0, 4096).status, OK);
    }
    assert_eq!(guest.request(0, IN, 1 << 40, 4096).status, IOERR);
    assert_eq!(device()["front_end"]["pid"], std::process::id());
    let text = exchange(&control, "GET /metrics HTTP/1.1");
    let (head, text) = text.split_once("\r\n\r\n").unwrap();
    assert!(head.contains("text/plain; version=0.0.4"), "{head}");
    let label = "disk=\"a\\\\b\\\"c\"";
    for line in [
        format!("ovbd_requests_total{{{label},op=\"read\",result=\"ok\"}} 3"),
        format!("ovbd_requests_total{{{label},op=\"other\",result=\"ioerr\"}} 1"),
        format!("ovbd_request_bytes_total{{{label},op=\"read\"}} 12288"),
        format!("ovbd_disk_connected{{{label}}} 1"),
    ] {
        assert!(text.contains(&line), "{line}: {text}");
    }
    let mut promtool = Command::new(server_program("usr/bin/promtool"))
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = promtool.stdin.take().unwrap();
    stdin.write_all(text.as_bytes()).unwrap();
    drop(stdin);
    assert!(promtool.wait().unwrap().success(), "{text}");
    let head = exchange(&control, "HEAD /metrics HTTP/1.1");
    assert!(
        head.starts_with("HTTP/1.1 200") && head.ends_with("\r\n\r\n"),
        "{head}"
    );
    let openmetrics = "GET /metrics HTTP/1.1\r\nAccept: application/openmetrics-text";
    assert!(exchange(&control, openmetrics).ends_with("# EOF\n"));
    assert!(exchange(&control, "PUT /metrics HTTP/1.1").starts_with("HTTP/1.1 405"));
}

#[test]
fn the_counters_outlive_a_killed_daemon() {
    let folder = tempfile::tempdir().unwrap();
    let (mut disk, _) = serve(folder.path());
    for round in 1..=2 {
        let mut guest = disk.guest(Options::default());
        guest.read(0, 0, 512);
        let figures = Figures::read(&folder.path().join("stats")).unwrap();
        assert_eq!(figures.requests(Op::Read), [round, 0, 0]);
        assert_eq!(figures.disk(DiskCell::Connections), round);
        disk.daemon.kill();
        disk.daemon.restart();
        let figures = Figures::read(&folder.path().join("stats")).unwrap();
        assert_eq!(figures.disk(DiskCell::Connected), 0, "a gauge");
        assert_eq!(figures.disk(DiskCell::QueuesActive), 0, "a gauge");
    }
}
