//! Storage that is slow, fails, or shrinks: what fails, fails for the reads that touch it, and
//! nothing is ever wrong.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use common::PATIENCE;
use common::blk::{IN, IOERR, OK, SECTOR};
use common::daemon::Daemon;
use common::guest::{Guest, Options};
use common::layers::{LayerBuilder, Pack, noise, write, zfile};
use common::queue::Layout;
use common::recorder::Recorder;
use ovbd_vhost::image::Image;
use ovbd_vhost::image::config::Stack;
use ovbd_vhost::image::pieces::Piece;
use ovbd_vhost::units::{Sector, SectorRange};

/// Sectors of the disk.
const SECTORS: u64 = 4096;

/// Name of the layer that fails.
const LAYER: &str = "layer.obd";

/// Both forms in which a layer's bytes lie in its file, and the disk they make.
fn forms() -> [(&'static str, Vec<u8>, Vec<u8>); 2] {
    let disk = noise(7, (SECTORS * SECTOR) as usize);
    let plain = LayerBuilder::new(SECTORS * SECTOR).data(0, &disk).lsmt();
    let packed = zfile(&plain, Pack::default());
    [("plain", plain, disk.clone()), ("packed", packed, disk)]
}

/// Where the bytes of `sectors` sectors from `start` on lie in the file at `path`.
fn stored(path: &std::path::Path, start: u64, sectors: u64) -> std::ops::Range<u64> {
    let image = Image::open(&Stack::new([path])).expect("layer");
    let ranges = image
        .at_own_size()
        .pieces(SectorRange::new(Sector(start), Sector(start + sectors)))
        .map(|piece| match piece {
            Piece::Plain { offset, len, .. } => offset..offset + len,
            Piece::Compressed(run) => run.offset..run.offset + u64::from(run.stored),
            Piece::Zero { .. } => panic!("the disk has no holes"),
        });
    ranges
        .reduce(|all, next| all.start.min(next.start)..all.end.max(next.end))
        .expect("a piece")
}

fn expected(disk: &[u8], sector: u64, len: usize) -> &[u8] {
    let start = (sector * SECTOR) as usize;
    &disk[start..start + len]
}

/// Reads the whole disk, 64 KiB at a time.
fn read_all(guest: &mut Guest, disk: &[u8]) {
    for sector in (0..SECTORS).step_by(128) {
        assert!(
            guest.read(0, sector, 128 * 512) == expected(disk, sector, 128 * 512),
            "{sector}"
        );
    }
}

#[test]
fn a_slow_read_delays_no_other() {
    for (form, file, disk) in forms() {
        let scratch = tempfile::tempdir().unwrap();
        let healthy = write(scratch.path(), "layer", &file);
        let slow = stored(&healthy, 2048, 8);
        let files = Recorder::mount_with(LAYER, file);
        let daemon = Daemon::serve(&[files.path().join(LAYER)]);
        let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
        let hold = files.hold_reads(slow);

        let held = guest.place(IN, 2048, 4096);
        let layout = Layout::Direct;
        let waiting = guest.queues[0].submit(&held.chain, layout);
        guest.queues[0].publish();
        hold.wait();
        // More than the ring has room for, on the same queue.
        for number in 0..300u64 {
            let sector = number * 5 % 1500;
            let placed = guest.place(IN, sector, 4096);
            guest.queues[0].submit(&placed.chain, layout);
            guest.queues[0].publish();
            let used = guest.queues[0].wait();
            assert_ne!(
                used.head,
                u32::from(waiting),
                "{form}: the held read came back"
            );
            let answer = guest.answer(&placed, used);
            assert_eq!(answer.status, OK, "{form}: sector {sector}");
            assert_eq!(
                answer.data,
                expected(&disk, sector, 4096),
                "{form}: sector {sector}"
            );
        }
        drop(hold);
        let used = guest.queues[0].wait();
        assert_eq!(used.head, u32::from(waiting));
        let answer = guest.answer(&held, used);
        assert_eq!(
            (answer.status, &answer.data[..]),
            (OK, expected(&disk, 2048, 4096)),
            "{form}"
        );
    }
}

/// State of the thread of queue 0: `S` while it sleeps.
fn worker_state(daemon: &Daemon) -> char {
    let tasks = format!("/proc/{}/task", daemon.pid().as_raw_nonzero());
    let mut threads = std::fs::read_dir(tasks)
        .expect("threads")
        .map(|task| task.unwrap().path());
    let ours = |path: &std::path::PathBuf| {
        std::fs::read(path.join("comm")).is_ok_and(|name| name == b"queue-0\n")
    };
    let stat = std::fs::read_to_string(threads.find(ours).expect("a worker").join("stat"));
    let stat = stat.expect("stat");
    stat.rsplit(") ")
        .next()
        .and_then(|rest| rest.chars().next())
        .expect("state")
}

#[test]
fn a_worker_with_more_to_do_than_it_may_begin_sleeps_until_storage_answers() {
    const REQUESTS: usize = 250;
    let [(_, file, disk), _] = forms();
    let scratch = tempfile::tempdir().unwrap();
    let slow = stored(&write(scratch.path(), "layer", &file), 2048, 8);
    let files = Recorder::mount_with(LAYER, file);
    let daemon = Daemon::serve(&[files.path().join(LAYER)]);
    let options = Options {
        queue_size: 256,
        ..Options::default()
    };
    let mut guest = Guest::boot(daemon.connect(), options).expect("guest");
    let hold = files.hold_reads(slow);
    // All into the same buffer: what they read is the same.
    let placed = guest.place(IN, 2048, 4096);
    for _ in 0..REQUESTS {
        guest.queues[0].submit(&placed.chain, Layout::Indirect);
    }
    guest.queues[0].publish();
    hold.wait();
    let (start, mut asleep) = (Instant::now(), 0);
    while asleep < 20 {
        assert!(start.elapsed() < PATIENCE, "the worker never rests");
        thread::sleep(Duration::from_millis(2));
        asleep = if worker_state(&daemon) == 'S' {
            asleep + 1
        } else {
            0
        };
    }
    drop(hold);
    for _ in 0..REQUESTS {
        guest.queues[0].wait();
    }
    assert_eq!(guest.memory.read(placed.status, 1), [OK]);
    let data = guest.memory.read(placed.data[0].address, 4096);
    assert!(data == expected(&disk, 2048, 4096));
}

#[test]
fn a_failing_disk_fails_the_reads_that_touch_it_and_no_others() {
    for (form, file, disk) in forms() {
        for io in ["uring", "pread"] {
            let scratch = tempfile::tempdir().unwrap();
            let healthy = write(scratch.path(), "layer", &file);
            let bad = stored(&healthy, 2048, 8);
            let files = Recorder::mount_with(LAYER, file.clone());
            let mut daemon = Daemon::with(&[files.path().join(LAYER)], &["--io", io]);
            let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
            files.fail_reads(bad);
            for _ in 0..3 {
                let answer = guest.request(0, IN, 2048, 4096);
                assert_eq!((answer.status, answer.len), (IOERR, 1), "{form} {io}");
                let answer = guest.request(0, IN, 3500, 8192);
                assert_eq!(answer.status, OK, "{form} {io}: far from the damage");
                assert_eq!(answer.data, expected(&disk, 3500, 8192), "{form} {io}");
            }
            files.heal();
            read_all(&mut guest, &disk);
            daemon.assert_alive();
        }
    }
}

#[test]
fn a_layer_cut_short_in_service_gives_errors_and_recovers() {
    for (form, content, disk) in forms() {
        for io in ["uring", "pread"] {
            let scratch = tempfile::tempdir().unwrap();
            let path = write(scratch.path(), "layer", &content);
            let end = stored(&path, 2048, 8).start;
            let mut daemon = Daemon::with(&[&path], &["--io", io]);
            let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
            // Twice, so that all of it is served from memory.
            read_all(&mut guest, &disk);
            read_all(&mut guest, &disk);
            let file = File::options().write(true).open(&path).unwrap();
            file.set_len(end).unwrap();
            // In a mapping a file ends with a whole page, so read a little further.
            let answer = guest.request(0, IN, 2100, 4096);
            assert_eq!(answer.status, IOERR, "{form} {io}");
            let answer = guest.request(0, IN, 8, 4096);
            assert_eq!(
                (answer.status, &answer.data[..]),
                (OK, expected(&disk, 8, 4096))
            );
            let answer = guest.request(0, IN, 3000, 512);
            assert_eq!(answer.status, IOERR, "{form} {io}");
            file.write_all_at(&content[end as usize..], end).unwrap();
            read_all(&mut guest, &disk);
            daemon.assert_alive();
        }
    }
}

/// The rest of a page in which a file ends reads as zeros in a mapping, without a fault.
#[test]
fn a_layer_cut_short_inside_a_page_gives_errors_too() {
    for (form, content, disk) in forms() {
        let scratch = tempfile::tempdir().unwrap();
        let path = write(scratch.path(), "layer", &content);
        let end = stored(&path, 2051, 1).start;
        assert_ne!(end % 4096, 0, "{form}");
        let daemon = Daemon::serve(&[&path]);
        let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
        read_all(&mut guest, &disk);
        read_all(&mut guest, &disk);
        let file = File::options().write(true).open(&path).unwrap();
        file.set_len(end).unwrap();
        for sector in 2051..2056 {
            let answer = guest.request(0, IN, sector, 512);
            assert_eq!(answer.status, IOERR, "{form}: sector {sector}");
        }
        file.write_all_at(&content[end as usize..], end).unwrap();
        read_all(&mut guest, &disk);
    }
}

#[test]
fn a_read_that_comes_short_is_gone_on_with() {
    for (form, file, disk) in forms() {
        for io in ["uring", "pread"] {
            let scratch = tempfile::tempdir().unwrap();
            let healthy = write(scratch.path(), "layer", &file);
            let all = stored(&healthy, 2048, 128);
            // The first half of what one read wants is there, the second is not.
            let middle = (all.start + all.end) / 2 / 4096 * 4096;
            let files = Recorder::mount_with(LAYER, file.clone());
            let daemon = Daemon::with(&[files.path().join(LAYER)], &["--io", io]);
            let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
            files.fail_reads(middle..all.end);
            let answer = guest.request(0, IN, 2048, 65536);
            assert_eq!(answer.status, IOERR, "{form} {io}");
            files.heal();
            let found = guest.read(0, 2048, 65536);
            assert!(found == expected(&disk, 2048, 65536), "{form} {io}");
        }
    }
}
