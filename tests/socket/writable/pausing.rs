//! Writes that wait while the storage is full (`--on-full pause`): they end once there is space, reads continue
//! meanwhile, nothing waits for them, and no crash loses what was answered.

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use common::PATIENCE;
use common::blk::{
    self, DISCARD, FLUSH, IN, IOERR, OK, OUT, SECTOR, UNANSWERED, WRITE_ZEROES, range,
};
use common::content::tagged;
use common::guest::{Guest, Options};
use common::memory::Memory;
use common::queue::{Layout, Queue, Segment};
use common::recorder::{Call, Recorder};
use common::returning::Returning;
use common::session::feature;
use common::writable::Writable;
use fuser::Errno;
use serde_json::Value;
use tempfile::TempDir;

use super::control::ask;
use super::full::{Small, stuff};
use super::{assert_beginning, assert_disk, part, write, zero};

/// Sectors of a request.
const LEN: u64 = 64;

/// A disk whose writes wait while its storage is full, and what it must hold.
struct Fixture {
    disk: Writable,
    model: Vec<u8>,
    /// Where the control socket is.
    folder: TempDir,
    round: u64,
}

/// A request that is under way.
struct Sent {
    head: u16,
    status: u64,
}

impl Fixture {
    fn start(serve: impl FnOnce(&[&str]) -> Writable, options: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("temporary directory");
        let control = folder.path().join("control");
        let pause = ["--on-full", "pause", "--control", control.to_str().unwrap()];
        let disk = serve(&[&pause[..], options].concat());
        Self {
            model: disk.content.to_vec(),
            disk,
            folder,
            round: 0,
        }
    }

    /// One whose layer lies on storage that fails on demand.
    fn on(files: &Recorder) -> Self {
        Self::start(|options| Writable::serve_at(files.path(), options), &[])
    }

    /// One whose layer lies in a small file system.
    fn in_small(small: &Small) -> Self {
        let inside = tempfile::tempdir_in(small.path()).expect("folder");
        Self::start(|options| Writable::serve_in(inside, options), &[])
    }

    fn control(&self) -> PathBuf {
        self.folder.path().join("control")
    }

    fn device(&self) -> Value {
        let answer = ask(&self.control(), "GET", "/api/v1/device", "");
        answer.expect("the control socket answers").1
    }

    /// Waits until so many requests wait for space.
    fn until_waiting(&self, requests: u64) {
        let start = Instant::now();
        loop {
            let device = self.device();
            if device["storage_full"]["waiting_requests"] == requests {
                let state = match requests {
                    0 => "serving",
                    _ => "paused: storage full",
                };
                assert_eq!(device["state"], state);
                return;
            }
            assert!(start.elapsed() < PATIENCE, "{device}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn fresh(&mut self) -> Vec<u8> {
        self.round += 1;
        tagged((LEN * SECTOR) as usize, self.round)
    }

    /// Submits a write of fresh data. The model has it already.
    fn submit_write(&mut self, guest: &mut Guest, index: usize, sector: u64) -> Sent {
        let data = self.fresh();
        part(&mut self.model, sector, LEN).copy_from_slice(&data);
        submit(guest, index, OUT, sector, &data)
    }

    /// Submits a discard or a request to write zeroes. The model has them already.
    fn submit_zero(&mut self, guest: &mut Guest, kind: u32, sector: u64, sectors: u64) -> Sent {
        part(&mut self.model, sector, sectors).fill(0);
        submit(guest, 0, kind, 0, &range(sector, sectors as u32, 0))
    }

    /// Asserts that the log has so many lines about a pause that began, and about one that ended.
    fn assert_logged(&self, began: usize, ended: usize) {
        let log = self.disk.daemon.log();
        let count = |text| log.matches(text).count();
        let found = (
            count("the storage is full: writes wait"),
            count("no write waits for space"),
        );
        assert_eq!(found, (began, ended), "{log}");
    }

    /// Asserts that the disk holds what was written, now, after a crash, and after a power loss.
    fn assert_well(&mut self, guest: &mut Guest) {
        assert_beginning(guest, &self.model);
        self.disk.crash();
        let mut guest = self.disk.plain_guest();
        assert_beginning(&mut guest, &self.model);
        let data = self.fresh();
        write(&mut guest, &mut self.model, 20000, &data);
        guest.flush(0);
        self.disk.lose_power();
        assert_disk(&mut self.disk.plain_guest(), &self.model);
    }
}

/// Submits a request in memory that no other request has.
fn submit(guest: &mut Guest, index: usize, kind: u32, sector: u64, data: &[u8]) -> Sent {
    let small = guest.memory.regions[1].clone();
    let put = |bytes: &[u8], at: u64| {
        guest.memory.write(at, bytes);
        at
    };
    let header = put(&blk::header(kind, sector), small.alloc(16, 16));
    let status = put(&[UNANSWERED], small.alloc(1, 1));
    let mut chain = vec![Segment::readable(header, blk::HEADER)];
    if !data.is_empty() {
        let len = data.len() as u64;
        let at = put(data, guest.memory.regions[2].alloc(len, 16));
        chain.push(Segment::readable(at, len as u32));
    }
    chain.push(Segment::writable(status, 1));
    let head = guest.queues[index].submit(&chain, Layout::Direct);
    guest.queues[index].publish();
    Sent { head, status }
}

/// Waits for the answers to all requests that are under way, and asserts their status.
fn assert_answered(guest: &mut Guest, index: usize, sent: &[Sent], status: u8) {
    let heads = sent.iter().map(|_| guest.queues[index].wait().head);
    let mut heads: Vec<_> = heads.collect();
    heads.sort_unstable();
    let mut expected: Vec<_> = sent.iter().map(|sent| u32::from(sent.head)).collect();
    expected.sort_unstable();
    assert_eq!(heads, expected);
    for sent in sent {
        assert_eq!(guest.memory.read(sent.status, 1), [status]);
    }
}

fn assert_unanswered(guest: &Guest, sent: &[Sent]) {
    for sent in sent {
        assert_eq!(guest.memory.read(sent.status, 1), [UNANSWERED]);
    }
}

/// A guest whose front-end keeps an in-flight region.
fn tracked(fixture: &Fixture) -> (Guest, Returning) {
    let memory = Memory::typical();
    let event_idx = Returning::wanted().features & feature::EVENT_IDX != 0;
    let queue = Queue::new(&memory, 128, event_idx);
    let mut front_end = Returning::new(memory.clone(), vec![queue.ring.vring.clone()]);
    let guest = Guest {
        session: front_end.connect(fixture.disk.daemon.connect()),
        scratch: blk::Scratch::new(&memory, 512 << 10),
        queues: vec![queue],
        memory,
    };
    (guest, front_end)
}

#[test]
fn writes_wait_for_space_while_reads_go_on() {
    let small = Small::mount(4 << 20);
    let mut fixture = Fixture::in_small(&small);
    let options = Options {
        queues: 2,
        ..Options::default()
    };
    let mut guest = fixture.disk.guest(options);
    let data = fixture.fresh();
    write(&mut guest, &mut fixture.model, 0, &data);
    let before = fixture.model.clone();
    let ballast = small.path().join("ballast");
    stuff(&ballast);

    let mut sent = Vec::new();
    for sector in [1000, 2000, 3000, 4000, 5000, 6000] {
        sent.push(fixture.submit_write(&mut guest, 1, sector));
    }
    fixture.until_waiting(6);
    // What has its space already is written.
    guest.write(0, 0, &data);
    for sector in [0, 1000, 6000, 9000] {
        let found = guest.read(0, sector, (LEN * SECTOR) as u32);
        let bytes = (sector * SECTOR) as usize..((sector + LEN) * SECTOR) as usize;
        assert!(found == before[bytes], "sector {sector}");
    }
    // The queue of the waiting writes reads too.
    let read = guest.place(IN, 0, (LEN * SECTOR) as u32);
    guest.queues[1].submit(&read.chain, Layout::Direct);
    guest.queues[1].publish();
    let used = guest.queues[1].wait();
    assert_eq!(guest.answer(&read, used).data, data);
    guest.flush(0);
    assert_unanswered(&guest, &sent);
    fixture.assert_logged(1, 0);

    fs::remove_file(&ballast).expect("ballast");
    assert_answered(&mut guest, 1, &sent, OK);
    fixture.until_waiting(0);
    fixture.assert_logged(1, 1);
    assert_eq!(fixture.device()["storage_full"]["pauses"], 1);
    fixture.assert_well(&mut guest);
}

/// What a discard frees is given back by a flush, which the guest may not send while its writes wait.
#[test]
fn discarded_data_makes_space() {
    let small = Small::mount(4 << 20);
    let mut fixture = Fixture::in_small(&small);
    let mut guest = fixture.disk.plain_guest();
    for sector in (0..16 * LEN).step_by(LEN as usize) {
        let data = fixture.fresh();
        write(&mut guest, &mut fixture.model, sector, &data);
    }
    guest.flush(0);
    stuff(&small.path().join("ballast"));
    let sent = [fixture.submit_write(&mut guest, 0, 5000)];
    fixture.until_waiting(1);
    zero(
        &mut guest,
        &mut fixture.model,
        DISCARD,
        0,
        8 * LEN as u32,
        false,
    );
    assert_answered(&mut guest, 0, &sent, OK);
    fixture.until_waiting(0);
    assert_beginning(&mut guest, &fixture.model);
}

#[test]
fn every_change_waits_wherever_there_is_no_space() {
    for errno in [Errno::ENOSPC, Errno::EDQUOT] {
        let files = Recorder::mount();
        let mut fixture = Fixture::on(&files);
        let mut guest = fixture.disk.plain_guest();
        let data = fixture.fresh();
        write(&mut guest, &mut fixture.model, 0, &data);

        files.fail(Call::Write, "upper.data", errno);
        let sent = [fixture.submit_write(&mut guest, 0, 1000)];
        fixture.until_waiting(1);
        files.heal();
        assert_answered(&mut guest, 0, &sent, OK);

        for name in ["upper.index.journal0", "upper.index.journal1"] {
            files.fail(Call::Write, name, errno);
        }
        let sent = [
            fixture.submit_write(&mut guest, 0, 2000),
            fixture.submit_zero(&mut guest, DISCARD, 1010, 20),
            fixture.submit_zero(&mut guest, WRITE_ZEROES, 3000, 20),
        ];
        fixture.until_waiting(3);
        assert_unanswered(&guest, &sent);
        files.heal();
        assert_answered(&mut guest, 0, &sent, OK);

        // The index has no reserved space after a flush that failed.
        files.fail(Call::Write, "upper.index", errno);
        files.fail(Call::Reserve, "upper.index", errno);
        let sent = [
            submit(&mut guest, 0, FLUSH, 0, &[]),
            submit(&mut guest, 0, FLUSH, 0, &[]),
        ];
        fixture.until_waiting(2);
        files.heal();
        assert_answered(&mut guest, 0, &sent, OK);
        fixture.until_waiting(0);
        fixture.disk.lose_power();
        guest = fixture.disk.plain_guest();
        fixture.assert_well(&mut guest);
    }
}

/// Without a write cache, a write waits for its flush too.
#[test]
fn a_write_that_must_be_durable_waits_for_the_space_of_its_flush() {
    let files = Recorder::mount();
    let mut fixture = Fixture::on(&files);
    let mut options = Options::default();
    options.wanted.features &= !(feature::FLUSH | feature::CONFIG_WCE);
    let mut guest = fixture.disk.guest(options);
    files.fail(Call::Write, "upper.index", Errno::ENOSPC);
    let sent = [fixture.submit_write(&mut guest, 0, 1000)];
    fixture.until_waiting(1);
    assert_unanswered(&guest, &sent);
    files.heal();
    assert_answered(&mut guest, 0, &sent, OK);
    fixture.disk.lose_power();
    assert_beginning(&mut fixture.disk.plain_guest(), &fixture.model);
}

/// Whatever is not a lack of space fails as without the option, and so does a lack that no space ends.
#[test]
fn what_waiting_does_not_help_fails() {
    let files = Recorder::mount();
    let mut fixture = Fixture::on(&files);
    let mut guest = fixture.disk.plain_guest();
    let data = fixture.fresh();
    files.fail(Call::Write, "upper.data", Errno::EIO);
    assert_eq!(guest.send(0, OUT, 1000, &data), IOERR);
    files.heal();
    write(&mut guest, &mut fixture.model, 1000, &data);
    // What the system could not store it may have dropped.
    files.fail(Call::Sync, "upper.data", Errno::ENOSPC);
    assert_eq!(guest.send(0, FLUSH, 0, &[]), IOERR);
    files.heal();
    assert_eq!(guest.send(0, OUT, 1000, &data), IOERR);
    fixture.until_waiting(0);

    let serve = |options: &[&str]| Writable::serve_with(options);
    let mut fixture = Fixture::start(serve, &["--upper-limit", "64K"]);
    let mut guest = fixture.disk.plain_guest();
    for sector in [0, 1000] {
        let data = fixture.fresh();
        write(&mut guest, &mut fixture.model, sector, &data);
    }
    assert_eq!(guest.send(0, OUT, 2000, &data), IOERR);
    fixture.until_waiting(0);
    assert_beginning(&mut guest, &fixture.model);
}

#[test]
fn killed_or_stopped_while_writes_wait() {
    for kill in [true, false] {
        let files = Recorder::mount();
        let mut fixture = Fixture::on(&files);
        let (mut guest, mut front_end) = tracked(&fixture);
        let data = fixture.fresh();
        write(&mut guest, &mut fixture.model, 0, &data);
        files.fail(Call::Write, "upper.data", Errno::ENOSPC);
        let sent = [1000, 2000].map(|sector| fixture.submit_write(&mut guest, 0, sector));
        fixture.until_waiting(2);
        for _ in 0..2 {
            match kill {
                true => fixture.disk.crash(),
                false => fixture.disk.stop_and_start(),
            }
            assert_unanswered(&guest, &sent);
            guest.session = front_end.connect(fixture.disk.daemon.connect());
            fixture.until_waiting(2);
            guest.flush(0);
        }
        files.heal();
        assert_answered(&mut guest, 0, &sent, OK);
        fixture.assert_well(&mut guest);
    }
}

/// With an in-flight region the next connection has the requests; without one they fail. Neither a stop nor a
/// front-end that takes over waits for them.
#[test]
fn a_queue_stops_while_writes_wait() {
    let files = Recorder::mount();
    let mut fixture = Fixture::on(&files);
    let (mut guest, mut front_end) = tracked(&fixture);
    files.fail(Call::Write, "upper.data", Errno::ENOSPC);
    let sent = [fixture.submit_write(&mut guest, 0, 1000)];
    fixture.until_waiting(1);
    guest.session.stop_queue(0).expect("stop");
    assert_unanswered(&guest, &sent);
    fixture.until_waiting(0);
    guest.session = front_end.connect(fixture.disk.daemon.connect());
    fixture.until_waiting(1);
    files.heal();
    assert_answered(&mut guest, 0, &sent, OK);

    let mut guest = fixture.disk.plain_guest();
    for take_over in [false, true] {
        let before = fixture.model.clone();
        files.fail(Call::Write, "upper.data", Errno::ENOSPC);
        let sent = [fixture.submit_write(&mut guest, 0, 5000)];
        fixture.until_waiting(1);
        let mut next = None;
        match take_over {
            true => next = Some(fixture.disk.plain_guest()),
            false => drop(guest.session.stop_queue(0).expect("stop")),
        }
        assert_answered(&mut guest, 0, &sent, IOERR);
        fixture.model = before;
        files.heal();
        match next {
            Some(next) => guest = next,
            None => guest.start_queue(0).expect("start"),
        }
        assert_beginning(&mut guest, &fixture.model);
    }
    assert_eq!(fixture.disk.daemon.terminate().code(), Some(0));
}

/// A snapshot does not wait for them, and what waits goes to the new layer.
#[test]
fn a_snapshot_while_writes_wait() {
    let files = Recorder::mount();
    let mut fixture = Fixture::on(&files);
    let mut guest = fixture.disk.plain_guest();
    let data = fixture.fresh();
    write(&mut guest, &mut fixture.model, 0, &data);
    files.fail(Call::Write, "upper.data", Errno::ENOSPC);
    let sent = [fixture.submit_write(&mut guest, 0, 1000)];
    fixture.until_waiting(1);
    let taken = ask(
        &fixture.control(),
        "POST",
        "/api/v1/snapshots",
        r#"{"name":"a"}"#,
    );
    assert_eq!(taken.expect("an answer").0, 200);
    assert_answered(&mut guest, 0, &sent, OK);
    files.heal();
    fixture.assert_well(&mut guest);
}
