//! What the daemon, once it serves, can no longer do.
//!
//! The running daemon is looked at from outside (`/proc`). What its fences hold back is tried from
//! inside (`probes`).

mod fetcher;
mod probes;
mod start;
#[cfg(target_arch = "x86_64")]
mod tool;
mod users;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::PATIENCE;
use common::content::tagged;
use common::daemon::Daemon;
use common::disk::{Disk, deep};
use common::guest::{Guest, Options};
use common::writable::Writable;
use rustix::process::Pid;
use rustix::thread::{CapabilitySet, capabilities};

/// The fields of `/proc/PID/status` for each thread of a process.
fn statuses(pid: Pid) -> Vec<String> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("the daemon runs");
    // A thread that ends meanwhile has no status.
    threads
        .filter_map(|thread| fs::read_to_string(thread.unwrap().path().join("status")).ok())
        .collect()
}

fn field<'a>(status: &'a str, name: &str) -> &'a str {
    let line = status.lines().find(|line| line.starts_with(name));
    line.and_then(|line| line.split_once(":\t")).expect(name).1
}

/// No capability, none to gain, and a filter of system calls.
fn assert_confined(status: &str) {
    let name = field(status, "Name");
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(field(status, set), "0000000000000000", "{name}: {set}");
    }
    let own = capabilities(None).unwrap().effective;
    if own.contains(CapabilitySet::SETPCAP) {
        assert_eq!(field(status, "CapBnd"), "0000000000000000", "{name}");
    }
    assert_eq!(field(status, "NoNewPrivs"), "1", "{name}");
    assert_eq!(field(status, "Seccomp"), "2", "{name}: a filter");
}

/// Asserts that the threads of a process are these, and that all are confined.
fn assert_threads(pid: Pid, names: &[&str]) {
    let started = Instant::now();
    loop {
        let threads = statuses(pid);
        let mut found: Vec<_> = threads.iter().map(|status| field(status, "Name")).collect();
        found.sort_unstable();
        threads.iter().for_each(|status| assert_confined(status));
        if found == names {
            return;
        }
        // A thread that has just started has the name of the program.
        let late = started.elapsed() > PATIENCE;
        assert!(!late, "threads {found:?}, expected {names:?}");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn no_thread_of_the_running_daemon_has_a_privilege_left() {
    let disk = Disk::serve();
    let mut guest = disk.guest(Options {
        queues: 2,
        ..Options::default()
    });
    guest.assert_reads(0, &disk.content);
    let names = ["front-end", "ovbd-vhost", "queue-0", "queue-1"];
    assert_threads(disk.daemon.pid(), &names);
    assert!(!disk.daemon.log().contains("WARN"), "{}", disk.daemon.log());
}

#[test]
fn no_thread_of_a_writable_device_has_a_privilege_left() {
    let folder = tempfile::tempdir().unwrap();
    let control = folder.path().join("control");
    let disk = Writable::serve_with(&["--control", control.to_str().unwrap()]);
    let mut guest = disk.guest(Options {
        queues: 2,
        ..Options::default()
    });
    guest.write(0, 7, &[7; 4096]);
    guest.flush(1);
    // A client that has not sent its request.
    let _client = UnixStream::connect(&control).unwrap();
    let names = [
        "control-client",
        "flush-0",
        "flush-1",
        "front-end",
        "ovbd-vhost",
        "queue-0",
        "queue-1",
    ];
    assert_threads(disk.daemon.pid(), &names);
    assert!(!disk.daemon.log().contains("WARN"), "{}", disk.daemon.log());
}

/// The status of a thread named `name` of this process, if there was one while `act` ran.
fn seen_thread(pid: Pid, name: &str, act: impl FnOnce()) -> Option<String> {
    let ended = AtomicBool::new(false);
    thread::scope(|scope| {
        let watching = scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                let threads = fs::read_dir(format!("/proc/{pid}/task"))
                    .into_iter()
                    .flatten();
                // Those that have ended meanwhile have no status.
                let mut statuses = threads.filter_map(|thread| {
                    fs::read_to_string(thread.ok()?.path().join("status")).ok()
                });
                let status = statuses.find(|status| field(status, "Name") == name);
                if status.is_some() {
                    return status;
                }
            }
            None
        });
        act();
        ended.store(true, Ordering::Relaxed);
        watching.join().unwrap()
    })
}

/// It lives for a moment at the end: the daemon is ended until that was seen.
#[test]
fn the_thread_of_the_last_flush_has_no_privilege_left() {
    let mut disk = Writable::serve();
    let start = Instant::now();
    loop {
        let mut guest = disk.plain_guest();
        write_much(&mut guest);
        drop(guest);
        let seen = seen_thread(disk.daemon.pid(), "last-flush", || {
            assert_eq!(disk.daemon.terminate().code(), Some(0));
        });
        if let Some(status) = seen {
            return assert_confined(&status);
        }
        assert!(start.elapsed() < PATIENCE, "no last flush");
        disk.daemon.restart();
    }
}

/// It lives while a layer is sealed: snapshots are taken until that was seen.
#[test]
fn the_thread_that_seals_has_no_privilege_left() {
    let folder = tempfile::tempdir().unwrap();
    let control = folder.path().join("control");
    let disk = Writable::serve_with(&["--control", control.to_str().unwrap()]);
    let mut guest = disk.plain_guest();
    let start = Instant::now();
    for number in 0.. {
        write_much(&mut guest);
        let seen = seen_thread(disk.daemon.pid(), "seal", || {
            // The second request waits for the layer of the first one.
            for wait in [false, true] {
                take_snapshot(&control, &number.to_string(), wait);
            }
        });
        if let Some(status) = seen {
            return assert_confined(&status);
        }
        assert!(start.elapsed() < PATIENCE, "no layer was sealed");
    }
}

fn take_snapshot(control: &Path, name: &str, wait: bool) {
    let body = format!(r#"{{"name":"{name}","wait":{wait}}}"#);
    let length = body.len();
    let request =
        format!("POST /api/v1/snapshots HTTP/1.1\r\nContent-Length: {length}\r\n\r\n{body}");
    let mut stream = UnixStream::connect(control).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

/// 8 MiB, which a flush or a seal takes a while for.
fn write_much(guest: &mut Guest) {
    for sector in (0..16 << 10).step_by(512) {
        guest.write(0, sector, &tagged(512 * 512, sector));
    }
}

#[test]
fn the_sandbox_can_be_left_out() {
    let mut disk = Disk::serve_with(&["--sandbox", "off"]);
    disk.assert_well();
    for status in statuses(disk.daemon.pid()) {
        assert_eq!(field(&status, "Seccomp"), "0");
        assert_eq!(field(&status, "NoNewPrivs"), "0");
    }
}

/// A layer that is cut while it is mapped: the fault handler works inside, too.
#[test]
fn a_fault_in_a_cut_layer_is_survived_inside() {
    let (case, _) = deep();
    let directory = tempfile::tempdir().unwrap();
    let layers: Vec<_> = case
        .layers
        .iter()
        .enumerate()
        .map(|(number, layer)| {
            let copy = directory.path().join(number.to_string());
            fs::copy(layer, &copy).unwrap();
            copy
        })
        .collect();
    let mut daemon = Daemon::serve(&layers);
    let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
    let read_all = |guest: &mut Guest| {
        (0..case.size / common::blk::SECTOR)
            .step_by(1024)
            .map(|sector| guest.request(0, common::blk::IN, sector, 4096).status)
            .filter(|status| *status != common::blk::OK)
            .count()
    };
    assert_eq!(read_all(&mut guest), 0);
    for layer in &layers {
        fs::File::options()
            .write(true)
            .open(layer)
            .unwrap()
            .set_len(512)
            .unwrap();
    }
    assert_ne!(read_all(&mut guest), 0, "what is gone cannot be read");
    daemon.assert_alive();
}
