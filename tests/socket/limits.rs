//! Rate limits of a disk. Buckets that refill in a day make the number of served requests exact.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use common::PATIENCE;
use common::blk::{self, FLUSH, GET_ID, IN, OK, SECTOR};
use common::content::difference;
use common::disk::Disk;
use common::guest::{Guest, Options};
use common::queue::Layout;
use ovbd_vhost::tool::ctl::{Ask, Error, ask};
use serde_json::{Value, json};
use tempfile::TempDir;

const DAY: u64 = 86_400_000;

struct Limited {
    disk: Disk,
    folder: TempDir,
}

impl Limited {
    fn serve(options: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let control = folder.path().join("control");
        let options = [options, &["--control", control.to_str().unwrap()]].concat();
        Self {
            disk: Disk::serve_with(&options),
            folder,
        }
    }

    fn control(&self) -> PathBuf {
        self.folder.path().join("control")
    }

    fn set(&self, limits: Value) -> Value {
        ask(&self.control(), &Ask::SetLimits { limits }).unwrap()
    }
}

/// Offers `count` requests of `len` bytes on queue 0 without waiting for them.
fn offer(guest: &mut Guest, count: usize, kind: u32, len: u32) {
    // `Guest::place` would reuse the memory of the requests before.
    for _ in 0..count {
        let header = guest.scratch.put(0, &blk::header(kind, 0), 0);
        let mut chain = vec![common::queue::Segment::readable(header, blk::HEADER)];
        if len > 0 {
            let data = guest.scratch.take(1, len, 0);
            chain.push(common::queue::Segment::writable(data, len));
        }
        let status = guest.scratch.put(3, &[blk::UNANSWERED], 0);
        chain.push(common::queue::Segment::writable(status, 1));
        guest.queues[0].submit(&chain, Layout::Direct);
    }
    guest.queues[0].publish();
}

/// Waits for `count` answers, and asserts that no more come.
fn assert_served(guest: &mut Guest, count: usize) {
    for _ in 0..count {
        guest.queues[0].wait();
    }
    // Too early to find a further answer that is on its way; such a defect shows in most runs.
    std::thread::sleep(Duration::from_millis(20));
    assert!(
        guest.queues[0].take().is_none(),
        "more than {count} answers"
    );
}

#[test]
fn a_bucket_serves_its_burst_and_then_waits() {
    let burst = format!("size=20,refill_time={DAY},one_time_burst=5");
    let limited = Limited::serve(&["--limit-ops", &burst]);
    let mut guest = limited.disk.guest(Options::default());
    offer(&mut guest, 30, IN, 512);
    assert_served(&mut guest, 25);
    // Each of another kind takes a token as well.
    let bucket = |size: u64| json!({ "ops": { "size": size, "refill_time": DAY } });
    limited.set(bucket(2));
    assert_served(&mut guest, 2);
    assert_eq!(
        limited.set(json!({})),
        json!({ "ops": null, "bandwidth": null })
    );
    for _ in 0..3 {
        guest.queues[0].wait();
    }
    limited.set(bucket(3));
    for (kind, len) in [(GET_ID, 20), (FLUSH, 0), (IN, 512)] {
        assert_eq!(guest.request(0, kind, 0, len).status, OK);
    }
    offer(&mut guest, 1, IN, 512);
    assert_served(&mut guest, 0);
}

#[test]
fn bytes_are_limited_and_a_flush_has_none() {
    let limited = Limited::serve(&[
        "--limit-bandwidth",
        &format!("size=65536,refill_time={DAY}"),
    ]);
    let mut guest = limited.disk.guest(Options::default());
    assert_eq!(guest.request(0, FLUSH, 0, 0).status, OK);
    offer(&mut guest, 20, IN, 4096);
    assert_served(&mut guest, 16);
    // The bucket is empty: not even a flush is taken, as it would overtake.
    limited.set(json!({ "bandwidth": { "size": 1, "refill_time": DAY } }));
    assert_served(&mut guest, 1); // a request larger than the bucket
}

#[test]
fn queues_share_the_limit() {
    let limited = Limited::serve(&["--limit-ops", &format!("size=20,refill_time={DAY}")]);
    let mut guest = limited.disk.guest(Options {
        queues: 2,
        ..Options::default()
    });
    for number in 0..20 {
        let found = guest.read(number % 2, 0, SECTOR as u32);
        assert_eq!(difference(&found, limited.disk.expected(0, 512)), None);
    }
    for queue in 0..2 {
        let placed = guest.place(IN, 0, 512);
        guest.queues[queue].submit(&placed.chain, Layout::Direct);
        guest.queues[queue].publish();
    }
    std::thread::sleep(Duration::from_millis(20));
    assert!(guest.queues.iter_mut().all(|queue| queue.take().is_none()));
    limited.set(json!({}));
    for queue in &mut guest.queues {
        queue.wait();
    }
}

#[test]
fn a_rate_is_kept() {
    let limited = Limited::serve(&["--limit-ops", "size=50,refill_time=50"]);
    let mut guest = limited.disk.guest(Options::default());
    let start = Instant::now();
    // 50 at once and then one each millisecond. The upper limit only catches a hang.
    for _ in 0..250 {
        guest.read(0, 0, 512);
    }
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(199), "{took:?}");
    assert!(took < PATIENCE);
}

#[test]
fn a_throttled_queue_stops_at_once_and_goes_on_later() {
    let limited = Limited::serve(&["--limit-ops", &format!("size=1,refill_time={DAY}")]);
    let mut guest = limited.disk.guest(Options::default());
    offer(&mut guest, 5, IN, 512);
    assert_served(&mut guest, 1);
    assert_eq!(guest.session.stop_queue(0).unwrap(), 1, "one was taken");
    guest.start_queue(0).unwrap();
    assert_served(&mut guest, 0);
    limited.set(json!({}));
    for _ in 0..4 {
        guest.queues[0].wait();
    }
    limited.set(json!({ "ops": { "size": 1, "refill_time": DAY } }));
    offer(&mut guest, 5, IN, 512);
    assert_served(&mut guest, 1);
    drop(guest);
    // The next front-end is served, and the daemon ends, although requests waited.
    let mut disk = limited.disk;
    let mut next = Guest::boot(disk.daemon.connect(), Options::default()).unwrap();
    offer(&mut next, 1, IN, 512);
    assert_served(&mut next, 0);
    assert!(disk.daemon.terminate().success());
}

#[test]
fn a_disk_is_not_slowed_by_the_limit_of_another() {
    let limited = Limited::serve(&["--limit-ops", &format!("size=1,refill_time={DAY}")]);
    let free = Disk::serve();
    let mut throttled = limited.disk.guest(Options::default());
    offer(&mut throttled, 40, IN, 512);
    assert_served(&mut throttled, 1);
    let mut guest = free.guest(Options::default());
    guest.assert_reads(0, &free.content);
    assert_served(&mut throttled, 0);
}

#[test]
fn limits_are_reported_and_wrong_ones_refused() {
    let limited = Limited::serve(&["--limit-ops", "size=7,refill_time=9"]);
    let ops = json!({ "size": 7, "one_time_burst": 0, "refill_time": 9 });
    let device = ask(&limited.control(), &Ask::Device).unwrap();
    assert_eq!(device["limits"], json!({ "ops": ops, "bandwidth": null }));
    for limits in [
        json!({ "op": null }),
        json!({ "ops": { "size": 0, "refill_time": 9 } }),
        json!({ "ops": { "size": 5, "refill_time": 0 } }),
        json!({ "ops": 5 }),
        json!([]),
    ] {
        let refused = ask(&limited.control(), &Ask::SetLimits { limits });
        assert!(
            matches!(refused, Err(Error::Refused { status: 400, .. })),
            "{refused:?}"
        );
    }
    let device = ask(&limited.control(), &Ask::Device).unwrap();
    assert_eq!(device["limits"]["ops"], ops, "unchanged");
}
