//! What a trace brings in, and what the control socket says about it.

use std::fs;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use common::daemon::Daemon;
use common::guest::{Guest, Options};
use common::layers::wrap_tar;
use common::registries::{DockerRegistry, Storage};
use common::registry_server::{Server, answer, serve, until};
use common::remote::{Layers, Place, REPOSITORY};
use ovbd_vhost::format::trace::{self, TracedRead};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::fetching;

const PIECE: usize = 64 << 10;

/// A trace of all of the bottom layer.
fn whole_bottom() -> Vec<u8> {
    let read = |at: u64| TracedRead {
        layer: 0,
        offset: at << 20,
        len: 1 << 20,
    };
    // Reads past the layer's end, and of layers that are not there, do nothing.
    let mut reads: Vec<_> = (0..20).map(read).collect();
    reads.push(TracedRead {
        layer: 77,
        offset: 0,
        len: u64::from(u32::MAX),
    });
    trace::encode(&reads)
}

fn write_trace(place: &Place) {
    fs::create_dir_all(place.path("trace-layer")).expect("a folder");
    fs::write(place.path("trace-layer/trace"), whole_bottom()).expect("a trace");
}

/// Waits until the bottom layer is local, then reads it without the registry.
fn check_prefetched<R>(layers: &Layers, place: &Place, server: R, options: &[&str]) {
    let control = place.path("control").display().to_string();
    let daemon = place.serve(&[&["--control", &control][..], options].concat());
    check_local(layers, place, server, &daemon);
}

fn check_local<R>(layers: &Layers, place: &Place, server: R, daemon: &Daemon) {
    until("the bottom layer is local", || {
        let bottom = &fetching(place)["layers"][0];
        bottom["local_bytes"] == bottom["bytes"]
    });
    let seen = fetching(place);
    assert!(
        seen["fetcher"]["replay_bytes"].as_u64() > Some(1 << 20),
        "{seen}"
    );
    assert_eq!(seen["fetcher"]["demand_bytes"], 0, "{seen}");
    drop(server);
    let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
    // Every other piece is the bottom layer's.
    for start in (PIECE..layers.content.len()).step_by(2 * PIECE) {
        let found = guest.read(0, start as u64 / 512, PIECE as u32);
        assert!(found == layers.content[start..start + PIECE], "at {start}");
    }
}

#[test]
fn a_trace_of_the_command_line_is_fetched_before_the_guest_reads() {
    let (layers, place) = (Layers::new(4), Place::default());
    let server = layers.registry();
    write_trace(&place);
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    let trace = place.path("trace-layer/trace").display().to_string();
    check_prefetched(&layers, &place, server, &["--prefetch", &trace]);
}

#[test]
fn the_trace_layer_of_a_config_is_no_layer_of_the_disk() {
    let (layers, place) = (Layers::new(4), Place::default());
    let server = layers.registry();
    write_trace(&place);
    let mut lowers = layers.lowers();
    lowers.push(json!({"dir": place.path("trace-layer")}));
    let more = json!({"accelerationLayer": true});
    place.config("http", &server.host(), &lowers, more);
    check_prefetched(&layers, &place, server, &[]);
}

#[test]
fn the_trace_layer_of_an_image_is_replayed() {
    let (layers, place) = (Layers::new(4), Place::default());
    let storage = Storage::default();
    let blobs: Vec<_> = layers.blobs.iter().map(Vec::as_slice).collect();
    storage.image_with_trace(REPOSITORY, "1", &blobs, &wrap_tar(&whole_bottom()));
    let registry = DockerRegistry::open(storage);
    let host = registry.host().to_owned();
    let control = place.path("control").display().to_string();
    let daemon = place.serve_image(&host, ":1", &["--control", &control]);
    check_local(&layers, &place, registry, &daemon);
}

/// What one guest reads is fetched for the next one before it asks.
#[test]
fn a_recorded_trace_leaves_nothing_to_wait_for() {
    let (layers, place) = (Layers::new(4), Place::default());
    let server = layers.registry();
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    let (trace, control) = (place.path("recorded"), place.path("control"));
    let (trace, control) = (trace.display().to_string(), control.display().to_string());
    let mut daemon = place.serve(&["--record-trace", &trace]);
    let wanted = [0, 2 << 20, 3 << 20, PIECE];
    let read = |daemon: &Daemon| {
        let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
        for start in wanted {
            let found = guest.read(0, start as u64 / 512, 4096);
            assert!(found == layers.content[start..start + 4096], "at {start}");
        }
    };
    read(&daemon);
    assert_eq!(daemon.terminate().code(), Some(0));
    let reads = trace::parse(&fs::read(&trace).expect("a trace")).expect("a trace");
    assert_covers(&reads, &wanted);
    place.forget_cache();
    let daemon = place.serve(&["--prefetch", &trace, "--control", &control]);
    check_foreseen(&daemon, &place, &server, || read(&daemon));
}

/// Waits until a trace is local, and checks that none of the reads asks for anything.
fn check_foreseen(daemon: &Daemon, place: &Place, server: &Server, read: impl FnOnce()) {
    until("the trace is local", || {
        daemon
            .log()
            .contains("prefetched the bytes recorded in the trace")
    });
    let requests = server.count();
    read();
    assert_eq!(server.count(), requests, "every read was foreseen");
    let seen = fetching(place);
    assert_eq!(seen["fetcher"]["demand_bytes"], 0, "{seen}");
    assert_eq!(seen["fetcher"]["read_ahead_bytes"], 0, "{seen}");
}

/// Checks that a trace has the reads of 4096 bytes at these bytes of the disk.
fn assert_covers(reads: &[TracedRead], wanted: &[usize]) {
    for start in wanted {
        let start = *start;
        // A header of 4096 bytes, then the pieces of the layer: every other one of the disk is the top's.
        let piece = start / PIECE;
        let (layer, start) = match piece % 2 {
            0 => (1, 4096 + piece / 2 * PIECE),
            _ => (0, 4096 + start),
        };
        let wanted = start as u64..start as u64 + 4096;
        let covers = |read: &TracedRead| {
            let end = read.offset + read.len;
            read.layer == layer && read.offset <= wanted.start && wanted.end <= end
        };
        assert!(reads.iter().any(covers), "{layer}: {wanted:?} in {reads:?}");
    }
}

/// Reads 4096 bytes at these bytes of the disk.
fn read_at(guest: &mut Guest, layers: &Layers, starts: &[usize]) {
    for start in starts {
        let found = guest.read(0, *start as u64 / 512, 4096);
        assert!(found == layers.content[*start..start + 4096], "at {start}");
    }
}

/// `ovbd trace record` records what a guest reads meanwhile, also of bytes that are local, and nothing else.
#[test]
fn a_trace_is_recorded_from_a_running_disk() {
    let (layers, place) = (Layers::new(4), Place::default());
    let server = layers.registry();
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    let (trace, control) = (place.path("recorded"), place.path("control"));
    let control_name = control.display().to_string();
    let daemon = place.serve(&["--control", &control_name]);
    let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
    let (before, during, after) = ([1 << 20, 2 << 20], [2 << 20, 3 << 20], [PIECE]);
    read_at(&mut guest, &layers, &before);
    for _ in 0..2 {
        let recordings = daemon.log().matches("PUT /api/v1/trace: 200").count();
        let mut command = Command::new(env!("CARGO_BIN_EXE_ovbd"));
        let command = command.args(["trace", "record"]).arg(&control).arg(&trace);
        let mut recording = command.spawn().expect("ovbd");
        until("the recording began", || {
            daemon.log().matches("PUT /api/v1/trace: 200").count() > recordings
        });
        read_at(&mut guest, &layers, &during);
        let pid = Pid::from_child(&recording);
        kill_process(pid, Signal::INT).expect("a signal");
        assert!(recording.wait().expect("ovbd").success());
        read_at(&mut guest, &layers, &after);
        let reads = trace::parse(&fs::read(&trace).expect("a trace")).expect("a trace");
        assert_covers(&reads, &during);
        let bytes: u64 = reads.iter().map(|read| read.len).sum();
        assert!(bytes <= 4 * PIECE as u64, "{reads:?}");
    }
    drop((guest, daemon));
    place.forget_cache();
    let trace = trace.display().to_string();
    let daemon = place.serve(&["--prefetch", &trace, "--control", &control_name]);
    let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
    check_foreseen(&daemon, &place, &server, || {
        read_at(&mut guest, &layers, &during)
    });
}

/// An empty file of `recordTracePath` is recorded to, until its lock file is removed or the daemon ends.
#[test]
fn an_empty_file_of_the_config_is_recorded_to() {
    for by_lock in [true, false] {
        let (layers, place) = (Layers::new(4), Place::default());
        let server = layers.registry();
        let (trace, lock, ok) = (place.path("t"), place.path("t.lock"), place.path("t.ok"));
        fs::write(&trace, "").expect("an empty file");
        let more = json!({"recordTracePath": trace});
        place.config("http", &server.host(), &layers.lowers(), more);
        let mut daemon = place.serve(&[]);
        assert!(lock.exists() && !ok.exists());
        let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
        read_at(&mut guest, &layers, &[2 << 20]);
        if by_lock {
            fs::remove_file(&lock).expect("the lock file");
            until("the trace is complete", || ok.exists());
            read_at(&mut guest, &layers, &[1 << 20]);
            daemon.assert_alive();
        }
        assert_eq!(daemon.terminate().code(), Some(0));
        assert!(ok.exists() && !lock.exists());
        let reads = trace::parse(&fs::read(&trace).expect("a trace")).expect("a trace");
        assert_covers(&reads, &[2 << 20]);
        // Not empty any more: it is replayed.
        place.forget_cache();
        let control = place.path("control").display().to_string();
        let _daemon = place.serve(&["--control", &control]);
        until("the trace is fetched", || {
            fetching(&place)["fetcher"]["replay_bytes"].as_u64() > Some(0)
        });
    }
}

/// Upstream's words for a config that has both.
#[test]
fn a_config_with_an_acceleration_layer_records_no_trace() {
    let (layers, place) = (Layers::new(1), Place::default());
    let mut lowers = layers.lowers();
    lowers.push(json!({"dir": place.path("trace-layer")}));
    let more = json!({"accelerationLayer": true, "recordTracePath": place.path("t")});
    place.config("http", "127.0.0.1:1", &lowers, more);
    let output = place.run(&[]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let result = place.result();
    let words = "Cannot record trace while acceleration layer exists";
    assert!(
        result.starts_with("failed:") && result.contains(words),
        "{result}"
    );
}

/// A list of files, as other tools write it, and traces that are damaged in every part.
#[test]
fn a_trace_that_is_none_is_only_a_line_in_the_log() {
    let (layers, place) = (Layers::new(1), Place::default());
    let server = layers.registry();
    let good = whole_bottom();
    let flipped = |at: usize| {
        let mut trace = good.clone();
        trace[at] ^= 0x40;
        trace
    };
    let last = good.len() - 1;
    let mut traces: Vec<_> = [0, 1, 8, 12, 16, last].map(flipped).to_vec();
    traces.push(b"/usr/bin/redis\n/etc/passwd\n".to_vec());
    traces.push(good[..last].to_vec());
    for (number, trace) in traces.iter().enumerate() {
        fs::write(place.path("trace"), trace).expect("a file");
        let more = json!({"recordTracePath": place.path("trace")});
        place.config("http", &server.host(), &layers.lowers(), more);
        let daemon = place.serve(&[]);
        let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
        guest.assert_reads(0, &layers.content);
        until("the log says so", || {
            daemon.log().contains("cannot replay the trace")
        });
        let lines = daemon.log().matches("WARN").count();
        assert_eq!(lines, 1, "{number}: {}", daemon.log());
    }
}

#[test]
fn the_control_socket_counts_what_is_fetched() {
    let (layers, place) = (Layers::new(2), Place::default());
    let fails = AtomicBool::new(true);
    let server =
        layers.registry_that(
            move |request, blob| match fails.swap(false, Ordering::SeqCst) {
                true => answer(503, &[], b""),
                false => serve(request, blob),
            },
        );
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    let control = place.path("control").display().to_string();
    let daemon = place.serve(&["--control", &control]);
    let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
    for start in (0..layers.content.len()).step_by(PIECE) {
        guest.read(0, start as u64 / 512, PIECE as u32);
    }
    let seen = fetching(&place);
    let fetcher = &seen["fetcher"];
    let number = |name: &str| fetcher[name].as_u64().expect(name);
    let all = ["start_bytes", "demand_bytes", "read_ahead_bytes"].map(number);
    let stored: u64 = layers.blobs.iter().map(|blob| blob.len() as u64).sum();
    assert!(all.iter().sum::<u64>() <= stored, "no byte twice: {seen}");
    assert!(all[0] > 0 && all[1] > 0, "{seen}");
    assert_eq!(number("answers_5xx"), 1, "{seen}");
    assert_eq!(number("retries"), 1, "{seen}");
    let answers = number("answers_2xx") + number("answers_5xx");
    assert_eq!(answers, server.count() as u64, "{seen}");
    assert_eq!(seen["waiting_reads"], 0, "{seen}");
    let waits = seen["waits"].as_object().expect("waits");
    assert!(
        waits.values().filter_map(Value::as_u64).sum::<u64>() > 0,
        "{seen}"
    );
    assert_eq!(seen["layers"][1]["bytes"], layers.blobs[1].len(), "{seen}");
}
