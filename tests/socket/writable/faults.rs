//! Storage of a writable layer that fails, vanishes or is used up while it is served: what fails,
//! fails for the requests it hits, what was answered stays, and nothing is ever wrong.

use std::fs::{self, File};
use std::thread;
use std::time::Duration;

use fuser::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, prlimit};
use serde_json::json;

use super::control::ask;
use super::{assert_beginning, part, write, zero};
use common::blk::UNANSWERED;
use common::blk::{DISCARD, FLUSH, IN, IOERR, OK, OUT, SECTOR, WRITE_ZEROES, range};
use common::content::tagged;
use common::daemon::Daemon;
use common::guest::{Guest, Options};
use common::queue::{Layout, Segment};
use common::recorder::{Call, Recorder};
use common::session::{Wanted, feature};
use common::writable::Writable;

/// Sectors of a write.
const LEN: u64 = 16;

/// A device with a writable layer, and what its disk must hold.
struct Fixture {
    disk: Writable,
    model: Vec<u8>,
    /// Writes made so far.
    round: u64,
}

impl Fixture {
    fn new(disk: Writable) -> Self {
        Self {
            model: disk.content.to_vec(),
            disk,
            round: 0,
        }
    }

    /// One whose layer lies on storage that fails on demand.
    fn on(files: &Recorder) -> Self {
        Self::new(Writable::serve_at(files.path(), &[]))
    }

    fn fresh(&mut self) -> Vec<u8> {
        self.round += 1;
        tagged((LEN * SECTOR) as usize, self.round)
    }

    /// A write that works.
    fn write(&mut self, guest: &mut Guest, sector: u64) {
        let data = self.fresh();
        write(guest, &mut self.model, sector, &data);
    }

    /// A write that fails: each sector is as before or as it would be. Which, is what it is from
    /// now on.
    fn fail_to_write(&mut self, guest: &mut Guest, sector: u64) {
        let data = self.fresh();
        assert_eq!(guest.send(0, OUT, sector, &data), IOERR);
        self.settle(guest, sector, &data);
    }

    /// Takes over which sectors have become `new`.
    fn settle(&mut self, guest: &mut Guest, sector: u64, new: &[u8]) {
        let found = guest.read(0, sector, new.len() as u32);
        let old = part(&mut self.model, sector, new.len() as u64 / SECTOR);
        let sectors = found.chunks(SECTOR as usize);
        let pairs = old.chunks(SECTOR as usize).zip(new.chunks(SECTOR as usize));
        for (at, (now, (old, new))) in (sector..).zip(sectors.zip(pairs)) {
            assert!(now == old || now == new, "sector {at}: neither old nor new");
        }
        old.copy_from_slice(&found);
    }

    /// Asserts that all is well: what is there, what is written, what a crash and a power loss leave.
    fn assert_well(&mut self, guest: &mut Guest) {
        self.disk.daemon.assert_alive();
        assert_beginning(guest, &self.model);
        for sector in [0, 100, 3000] {
            self.write(guest, sector);
        }
        zero(guest, &mut self.model, DISCARD, 105, 3, false);
        zero(guest, &mut self.model, WRITE_ZEROES, 3005, 3, false);
        assert_beginning(guest, &self.model);
        self.disk.crash();
        let mut guest = self.disk.plain_guest();
        assert_beginning(&mut guest, &self.model);
        self.write(&mut guest, 50);
        guest.flush(0);
        self.disk.lose_power();
        assert_beginning(&mut self.disk.plain_guest(), &self.model);
    }
}

/// Who writes where only a flush makes room waits for it; nobody else does.
#[test]
fn a_write_that_waits_for_a_flush_holds_nobody_up() {
    let files = Recorder::mount();
    let options = ["--upper-limit", "16K"];
    let mut fixture = Fixture::new(Writable::serve_at(files.path(), &options));
    let mut guest = fixture.disk.plain_guest();
    fixture.write(&mut guest, 0);
    fixture.write(&mut guest, 100);
    fixture.fail_to_write(&mut guest, 200);
    zero(
        &mut guest,
        &mut fixture.model,
        DISCARD,
        0,
        LEN as u32,
        false,
    );

    let held = files.hold_syncs("upper.data");
    let data = fixture.fresh();
    let mut placed = guest.place(OUT, 200, 512);
    // Not where the next requests have theirs.
    let at = guest.memory.regions[2].alloc(data.len() as u64, 4096);
    guest.memory.write(at, &data);
    placed.chain[1] = Segment::readable(at, data.len() as u32);
    let waiting = guest.queues[0].submit(&placed.chain, Layout::Direct);
    guest.queues[0].publish();
    held.wait();
    for sector in [100, 5000, 0, 200] {
        let read = guest.place(IN, sector, (LEN * SECTOR) as u32);
        guest.queues[0].submit(&read.chain, Layout::Direct);
        guest.queues[0].publish();
        let used = guest.queues[0].wait();
        assert_ne!(used.head, u32::from(waiting), "what waits came back");
        let answer = guest.answer(&read, used);
        assert_eq!(answer.status, OK);
        assert!(
            answer.data == *part(&mut fixture.model, sector, LEN),
            "{sector}"
        );
    }
    guest.memory.write(placed.status, &[UNANSWERED]);
    drop(held);
    let used = guest.queues[0].wait();
    assert_eq!(used.head, u32::from(waiting));
    assert_eq!(guest.memory.read(placed.status, 1), [OK]);
    part(&mut fixture.model, 200, LEN).copy_from_slice(&data);
    assert_beginning(&mut guest, &fixture.model);
    guest.flush(0);
    fixture.disk.lose_power();
    assert_beginning(&mut fixture.disk.plain_guest(), &fixture.model);
}

/// What storage says.
const ERRNOS: [Errno; 2] = [Errno::EIO, Errno::ENOSPC];

#[test]
fn data_that_cannot_be_written() {
    for errno in ERRNOS {
        let files = Recorder::mount();
        let mut fixture = Fixture::on(&files);
        let mut guest = fixture.disk.plain_guest();
        fixture.write(&mut guest, 0);
        files.fail(Call::Write, "upper.data", errno);
        for sector in [0, 8, 1000] {
            fixture.fail_to_write(&mut guest, sector);
        }
        // What needs no data goes on.
        zero(&mut guest, &mut fixture.model, DISCARD, 4, 2, false);
        guest.flush(0);
        assert_beginning(&mut guest, &fixture.model);
        files.heal();
        fixture.assert_well(&mut guest);
    }
}

#[test]
fn a_journal_that_cannot_be_written() {
    for errno in ERRNOS {
        // The second time, what was written in part cannot be taken back either.
        for call in [Call::Write, Call::Resize] {
            let files = Recorder::mount();
            let mut fixture = Fixture::on(&files);
            let mut guest = fixture.disk.plain_guest();
            fixture.write(&mut guest, 0);
            for name in ["upper.index.journal0", "upper.index.journal1"] {
                files.fail(Call::Write, name, errno);
                files.fail(call, name, errno);
            }
            fixture.fail_to_write(&mut guest, 8);
            fixture.fail_to_write(&mut guest, 1000);
            assert_eq!(guest.send(0, DISCARD, 0, &range(4, 2, 0)), IOERR);
            fixture.settle(&mut guest, 4, &[0; 1024]);
            // What is mapped already needs no journal; but one that holds what does not count would
            // count against it.
            match call {
                Call::Write => fixture.write(&mut guest, 0),
                _ => fixture.fail_to_write(&mut guest, 0),
            }
            assert_beginning(&mut guest, &fixture.model);
            files.heal();
            fixture.assert_well(&mut guest);
        }
    }
}

#[test]
fn no_room_for_the_index() {
    let files = Recorder::mount();
    let mut fixture = Fixture::on(&files);
    let mut guest = fixture.disk.plain_guest();
    files.fail(Call::Reserve, "upper.index", Errno::ENOSPC);
    for _ in 0..2 {
        fixture.fail_to_write(&mut guest, 0);
        assert_eq!(guest.send(0, DISCARD, 0, &range(4, 2, 0)), IOERR);
        guest.flush(0);
    }
    files.heal();
    fixture.write(&mut guest, 0);
    // A flush that failed may have lost it.
    files.fail(Call::Write, "upper.index", Errno::ENOSPC);
    files.fail(Call::Reserve, "upper.index", Errno::ENOSPC);
    assert_eq!(guest.send(0, FLUSH, 0, &[]), IOERR);
    fixture.fail_to_write(&mut guest, 1000);
    fixture.write(&mut guest, 0);
    files.heal();
    fixture.write(&mut guest, 1000);
    fixture.assert_well(&mut guest);

    // Where none can be taken ahead, it goes without.
    let files = Recorder::mount();
    let mut fixture = Fixture::on(&files);
    files.fail(Call::Reserve, "upper.index", Errno::EOPNOTSUPP);
    let mut guest = fixture.disk.plain_guest();
    fixture.write(&mut guest, 0);
    guest.flush(0);
    fixture.assert_well(&mut guest);
}

#[test]
fn an_index_that_cannot_be_written_or_synced() {
    for errno in ERRNOS {
        for call in [Call::Write, Call::Sync] {
            let files = Recorder::mount();
            let mut fixture = Fixture::on(&files);
            let mut guest = fixture.disk.plain_guest();
            fixture.write(&mut guest, 0);
            guest.flush(0);
            fixture.write(&mut guest, 1000);
            files.fail(call, "upper.index", errno);
            for _ in 0..3 {
                assert_eq!(guest.send(0, FLUSH, 0, &[]), IOERR);
            }
            fixture.write(&mut guest, 2000);
            assert_beginning(&mut guest, &fixture.model);
            files.heal();
            guest.flush(0);
            fixture.disk.lose_power();
            let mut guest = fixture.disk.plain_guest();
            assert_beginning(&mut guest, &fixture.model);
            fixture.assert_well(&mut guest);
        }
    }
}

/// The system forgets what it could not write: nothing is promised any more, until the daemon is
/// started again and goes on from what was durable.
#[test]
fn data_that_cannot_be_synced() {
    for errno in ERRNOS {
        for through in [false, true] {
            let files = Recorder::mount();
            let mut fixture = Fixture::on(&files);
            let mut wanted = Wanted::all();
            if through {
                wanted.features &= !(feature::FLUSH | feature::CONFIG_WCE);
            }
            let options = Options {
                wanted,
                ..Options::default()
            };
            let mut guest = fixture.disk.guest(options);
            fixture.write(&mut guest, 0);
            if !through {
                guest.flush(0);
            }
            let durable = fixture.model.clone();
            files.fail(Call::Sync, "upper.data", errno);
            let data = fixture.fresh();
            let status = guest.send(0, OUT, 1000, &data);
            assert_eq!(status, if through { IOERR } else { OK });
            part(&mut fixture.model, 1000, LEN).copy_from_slice(&data);
            if !through {
                assert_eq!(guest.send(0, FLUSH, 0, &[]), IOERR);
            }
            // That it works again now says nothing about what was lost.
            files.heal();
            for _ in 0..3 {
                fixture.fail_to_write(&mut guest, 0);
                fixture.fail_to_write(&mut guest, 2000);
                assert_eq!(guest.send(0, DISCARD, 0, &range(0, 2, 0)), IOERR);
                if !through {
                    assert_eq!(guest.send(0, FLUSH, 0, &[]), IOERR);
                }
            }
            assert_beginning(&mut guest, &fixture.model);
            let log = fixture.disk.daemon.log();
            assert_eq!(log.matches("lost data").count(), 1, "{log}");
            drop(guest);

            fixture.disk.crash();
            fixture.model = durable;
            let mut guest = fixture.disk.plain_guest();
            assert_beginning(&mut guest, &fixture.model);
            fixture.assert_well(&mut guest);
        }
    }
}

#[test]
fn a_snapshot_that_storage_refuses() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("control");
    let options = ["--control", socket.to_str().unwrap()];
    let recorder = Recorder::mount();
    let mut fixture = Fixture::new(Writable::serve_at(recorder.path(), &options));
    let mut guest = fixture.disk.plain_guest();
    fixture.write(&mut guest, 0);
    guest.flush(0);
    let names = recorder.names();
    let take = |name: &str| {
        let body = json!({ "name": name }).to_string();
        ask(&socket, "POST", "/api/v1/snapshots", &body).unwrap()
    };
    let mut round = 0;
    for (call, name) in [
        (Call::Create, "upper.data.1"),
        (Call::Write, "upper.data.1"),
        (Call::Sync, "upper.data.1"),
        (Call::Create, "upper.index.1.new"),
        (Call::Sync, "upper.index.1.new"),
        (Call::Link, "upper.index.1"),
        (Call::Create, "upper.index.1.journal1"),
        (Call::Write, "upper.index.1.journal0"),
        (Call::Create, "upper.data.snapshots.new"),
        (Call::Write, "upper.data.snapshots.new"),
        (Call::Sync, "upper.data.snapshots.new"),
        (Call::Rename, "upper.data.snapshots.new"),
        (Call::SyncFolder, ""),
    ] {
        for errno in ERRNOS {
            round += 1;
            recorder.fail(call, name, errno);
            let (status, said) = take("one");
            assert_eq!(status, 500, "{call:?} {name}: {said}");
            fixture.write(&mut guest, round * 20);
            guest.flush(0);
            recorder.heal();
        }
        assert_eq!(recorder.names(), names, "{call:?} {name} leaves something");
    }
    assert_beginning(&mut guest, &fixture.model);

    // The snapshot stands, but its layer cannot be finished, and so is no other begun.
    let frozen = fixture.model.clone();
    recorder.fail(Call::Write, "upper.data", Errno::ENOSPC);
    let (status, said) = take("one");
    assert_eq!((status, &said["sealed"]), (200, &json!(false)), "{said}");
    let body = json!({ "name": "one", "wait": true }).to_string();
    let (status, said) = ask(&socket, "POST", "/api/v1/snapshots", &body).unwrap();
    assert_eq!(status, 500, "{said}");
    let (status, said) = take("two");
    assert_eq!(status, 500, "{said}");
    fixture.write(&mut guest, 3);
    guest.flush(0);
    // Nor is it at the next start, which goes on without.
    fixture.write(&mut guest, 9);
    fixture.disk.crash();
    let mut guest = fixture.disk.plain_guest();
    assert_beginning(&mut guest, &fixture.model);
    fixture.write(&mut guest, 1000);
    recorder.heal();
    let (status, snapshot) = ask(&socket, "POST", "/api/v1/snapshots", &body).unwrap();
    assert_eq!(
        (status, &snapshot["sealed"]),
        (200, &json!(true)),
        "{snapshot}"
    );
    assert_beginning(&mut guest, &fixture.model);
    let layers = snapshot["layers"].as_array().unwrap().iter();
    let layers: Vec<_> = layers.map(|layer| layer.as_str().unwrap()).collect();
    let fork = Daemon::serve(&layers);
    let mut forked = Guest::boot(fork.connect(), Options::default()).expect("guest");
    assert_beginning(&mut forked, &frozen);
    fixture.write(&mut guest, 5000);
    drop(guest);
    fixture.disk.crash();
    assert_beginning(&mut fixture.disk.plain_guest(), &fixture.model);
}

/// The answer is there before the layer is; who opens it meanwhile has it once it is sealed.
#[test]
fn a_snapshot_is_answered_before_it_is_sealed() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("control");
    let options = ["--control", socket.to_str().unwrap()];
    let recorder = Recorder::mount();
    let mut fixture = Fixture::new(Writable::serve_at(recorder.path(), &options));
    let mut guest = fixture.disk.plain_guest();
    fixture.write(&mut guest, 0);
    guest.flush(0);
    let take = |name: &str, wait: bool| {
        let body = json!({ "name": name, "wait": wait }).to_string();
        let (status, answer) = ask(&socket, "POST", "/api/v1/snapshots", &body).unwrap();
        assert_eq!(status, 200, "{answer}");
        answer
    };
    // All is durable, so that sealing is what syncs it next.
    let held = recorder.hold_syncs("upper.data");
    let one = take("one", false);
    assert_eq!(one["sealed"], false);
    let frozen = fixture.model.clone();
    fixture.write(&mut guest, 100);
    guest.flush(0);
    let two = take("two", false);
    let frozen_later = fixture.model.clone();
    held.wait();
    fixture.write(&mut guest, 3);
    assert_beginning(&mut guest, &fixture.model);
    thread::scope(|scope| {
        let forks = [(&one, &frozen), (&two, &frozen_later)].map(|(snapshot, frozen)| {
            scope.spawn(move || {
                let layers = snapshot["layers"].as_array().unwrap().iter();
                let layers: Vec<_> = layers.map(|layer| layer.as_str().unwrap()).collect();
                let fork = Daemon::serve(&layers);
                let mut guest = Guest::boot(fork.connect(), Options::default()).expect("guest");
                assert_beginning(&mut guest, frozen);
            })
        });
        thread::sleep(Duration::from_millis(100));
        assert!(forks.iter().all(|fork| !fork.is_finished()));
        drop(held);
    });
    assert_eq!(take("two", true)["sealed"], true);
    let listed = ask(&socket, "GET", "/api/v1/snapshots", "").unwrap().1;
    let listed = listed.as_array().unwrap();
    assert_eq!(listed.len(), 2);
    assert!(listed.iter().all(|snapshot| snapshot["sealed"] == true));
    fixture.write(&mut guest, 5000);
    drop(guest);
    fixture.disk.crash();
    assert_beginning(&mut fixture.disk.plain_guest(), &fixture.model);
}

/// Fails where its data is gone, and nowhere else; and does not make up what was there.
#[test]
fn data_cut_short() {
    for io in ["uring", "pread"] {
        let mut disk = Writable::serve_with(&["--io", io]);
        let mut guest = disk.plain_guest();
        let mut model = disk.content.to_vec();
        for sector in 0..3 {
            let data = tagged((LEN * SECTOR) as usize, sector);
            write(&mut guest, &mut model, sector * 100, &data);
        }
        guest.flush(0);
        let path = disk.file("upper.data");
        let whole = fs::read(&path).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        let middle = 4096 + (LEN + LEN / 2) * SECTOR;
        file.set_len(middle).unwrap();
        let mut expect = |guest: &mut Guest, sector: u64, sectors: u64, status: u8| {
            let answer = guest.request(0, IN, sector, (sectors * SECTOR) as u32);
            assert_eq!(answer.status, status, "{io}: {sectors} sectors at {sector}");
            if status == OK {
                assert!(answer.data == *part(&mut model, sector, sectors), "{io}");
            }
        };
        for _ in 0..2 {
            expect(&mut guest, 0, LEN, OK);
            expect(&mut guest, 100, LEN / 2, OK);
            expect(&mut guest, 100, LEN, IOERR);
            expect(&mut guest, 208, 1, IOERR);
            expect(&mut guest, 500, LEN, OK);
            // A write behind the end would make zeros of what is missing.
            let data = tagged((LEN * SECTOR) as usize, 9);
            for sector in [200, 4000, 0] {
                assert_eq!(guest.send(0, OUT, sector, &data), IOERR, "{io}");
            }
            let zeros = guest.send(0, WRITE_ZEROES, 0, &range(204, 2, 0));
            assert_eq!(zeros, IOERR, "{io}");
            assert_eq!(guest.send(0, FLUSH, 0, &[]), IOERR, "{io}");
        }
        let log = disk.daemon.log();
        assert!(log.contains("upper.data") && log.contains(&middle.to_string()));
        fs::write(&path, whole).unwrap();
        guest.flush(0);
        assert_beginning(&mut guest, &model);
        let data = tagged((LEN * SECTOR) as usize, 77);
        write(&mut guest, &mut model, 4000, &data);
        guest.flush(0);
        disk.lose_power();
        assert_beginning(&mut disk.plain_guest(), &model);
    }
}

/// Everything in it is in memory as well: the next flush makes it anew.
#[test]
fn an_index_cut_short() {
    for len in [0, 100, 4096, 4096 + 20] {
        for more in [false, true] {
            let mut disk = Writable::serve();
            let mut guest = disk.plain_guest();
            let mut model = disk.content.to_vec();
            let mut put = |guest: &mut Guest, sector: u64| {
                let data = tagged((LEN * SECTOR) as usize, sector);
                write(guest, &mut model, sector, &data);
            };
            for sector in 0..3 {
                put(&mut guest, sector * 100);
                guest.flush(0);
            }
            let file = File::options().write(true).open(disk.file("upper.index"));
            file.unwrap().set_len(len).unwrap();
            if more {
                put(&mut guest, 5000);
            }
            guest.flush(0);
            put(&mut guest, 4000);
            guest.flush(0);
            disk.lose_power();
            assert_beginning(&mut disk.plain_guest(), &model);
        }
    }
}

/// Sets a soft limit of the running daemon; the hard one stays.
fn limit(daemon: &Daemon, resource: Resource, current: Option<u64>) {
    let maximum = getrlimit(resource).maximum;
    let current = current.or(maximum);
    prlimit(Some(daemon.pid()), resource, Rlimit { current, maximum }).expect("prlimit");
}

#[test]
fn files_as_long_as_a_process_may_make_them() {
    let mut fixture = Fixture::new(Writable::serve());
    let mut guest = fixture.disk.plain_guest();
    fixture.write(&mut guest, 0);
    guest.flush(0);
    let len = fs::metadata(fixture.disk.file("upper.data")).unwrap().len();
    limit(&fixture.disk.daemon, Resource::Fsize, Some(len + 1024));
    fixture.fail_to_write(&mut guest, 1000);
    fixture.write(&mut guest, 0);
    guest.flush(0);
    limit(&fixture.disk.daemon, Resource::Fsize, Some(80));
    fixture.fail_to_write(&mut guest, 1000);
    assert_eq!(guest.send(0, DISCARD, 0, &range(4, 2, 0)), IOERR);
    limit(&fixture.disk.daemon, Resource::Fsize, None);
    fixture.assert_well(&mut guest);
}

#[test]
fn out_of_descriptors() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("control");
    let options = ["--control", socket.to_str().unwrap()];
    let mut fixture = Fixture::new(Writable::serve_with(&options));
    let mut guest = fixture.disk.plain_guest();
    fixture.write(&mut guest, 0);
    // One for the connection that asks.
    let open = fixture.disk.daemon.count("fd") as u64 + 1;
    limit(&fixture.disk.daemon, Resource::Nofile, Some(open));
    fixture.write(&mut guest, 100);
    guest.flush(0);
    let take = || ask(&socket, "POST", "/api/v1/snapshots", "{\"name\": \"a\"}").unwrap();
    let (status, said) = take();
    assert_eq!(status, 500, "{said}");
    fixture.write(&mut guest, 200);
    guest.flush(0);
    limit(&fixture.disk.daemon, Resource::Nofile, None);
    let (status, said) = take();
    assert_eq!(status, 200, "{said}");
    fixture.assert_well(&mut guest);
}
