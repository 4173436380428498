//! Calls that fail, or are not answered.

use super::*;

/// A write that only a flush makes room for waits for the flush; no other request does.
#[test]
fn a_write_that_waits_for_a_flush_delays_no_other_request() {
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
            assert_eq!(log.matches("sync failed").count(), 1, "{log}");
            drop(guest);

            fixture.disk.crash();
            fixture.model = durable;
            let mut guest = fixture.disk.plain_guest();
            assert_beginning(&mut guest, &fixture.model);
            fixture.assert_well(&mut guest);
        }
    }
}
