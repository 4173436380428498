//! Snapshots on such storage.

use super::*;

/// A disk with a control socket whose first write is durable, and its guest.
fn controlled(recorder: &Recorder, socket: &Path) -> (Fixture, Guest) {
    let options = ["--control", socket.to_str().unwrap()];
    let mut fixture = Fixture::new(Writable::serve_at(recorder.path(), &options));
    let mut guest = fixture.disk.plain_guest();
    fixture.write(&mut guest, 0);
    guest.flush(0);
    (fixture, guest)
}

/// Asserts that another daemon on the layers of a snapshot serves `expected`.
fn assert_fork(snapshot: &Value, expected: &[u8]) {
    let layers = snapshot["layers"].as_array().unwrap().iter();
    let layers: Vec<_> = layers.map(|layer| layer.as_str().unwrap()).collect();
    let fork = Daemon::serve(&layers);
    let mut guest = Guest::boot(fork.connect(), Options::default()).expect("guest");
    assert_beginning(&mut guest, expected);
}

#[test]
fn a_snapshot_that_storage_refuses() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("control");
    let recorder = Recorder::mount();
    let (mut fixture, mut guest) = controlled(&recorder, &socket);
    let mut with_manifest = recorder.names();
    with_manifest.push("upper.data.snapshots".into());
    with_manifest.sort_unstable();
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
        // The manifest holds the number of the next pair from the first attempt on: without it, the files that a kill
        // leaves could not be told from others.
        assert_eq!(
            recorder.names(),
            with_manifest,
            "{call:?} {name} leaves something"
        );
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
    assert_fork(&snapshot, &frozen);
    fixture.write(&mut guest, 5000);
    drop(guest);
    fixture.disk.crash();
    assert_beginning(&mut fixture.disk.plain_guest(), &fixture.model);
}

/// The answer comes before the layer is sealed; a daemon that opens it meanwhile serves it once it
/// is.
#[test]
fn a_snapshot_is_answered_before_it_is_sealed() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("control");
    let recorder = Recorder::mount();
    let (mut fixture, mut guest) = controlled(&recorder, &socket);
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
                assert_fork(snapshot, frozen);
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
