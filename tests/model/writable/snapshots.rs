//! Snapshots against the model.

use super::*;
use common::volume::BlockingIo as _;

/// Snapshots while threads write: each holds one moment, nothing written is lost, and others open
/// them at once.
#[test]
fn snapshots_hold_what_was_there_when_they_were_taken() {
    for kind in KINDS {
        let mut disk = Disk::new(kind);
        disk.volume = None;
        let stack = Stack::new([disk.folder.path().join("lower.obd")]);
        let device = || common::volume::open(&stack, &disk.paths, Options::default()).unwrap();
        let mut model = disk.now.clone();
        let mut taken = Vec::new();
        for round in 0..3_u8 {
            let (volume, snapshots) = device();
            for number in 0..2 {
                let fill = round * 16 + number + 1;
                let start = u64::from(fill) * 5;
                put(&volume, start, &mut [fill; 40 * 512]).unwrap();
                volume.discard(common::sectors(start + 8, 3)).unwrap();
                model[start as usize..start as usize + 40].fill([fill; 512]);
                model[start as usize + 8..start as usize + 11].fill([0; 512]);
                let name = format!("{round} {number}");
                let mut snapshot = snapshots.take(&name).unwrap();
                assert_eq!(snapshots.take(&name).unwrap(), snapshot);
                assert!(!snapshot.sealed);
                snapshot.sealed = true;
                if round == 1 {
                    snapshots.seal().unwrap();
                    assert_eq!(snapshots.take(&name).unwrap(), snapshot);
                }
                let now = content(&volume);
                assert!(now == model, "{kind:?} {name}");
                taken.push((snapshot, model.clone()));
            }
        }
        let (volume, snapshots) = device();
        assert!(content(&volume) == model);
        let listed = snapshots.list();
        assert!(listed.iter().eq(taken.iter().map(|(snapshot, _)| snapshot)));
        for (snapshot, model) in taken {
            let image = Image::open(&Stack::new(&snapshot.layers)).unwrap();
            let top = image.layers().last().unwrap();
            assert_eq!(top.uuid(), snapshot.uuid);
            assert!(
                content(&Volume::read_only(image)) == model,
                "{}",
                snapshot.name
            );
        }
    }
}

#[test]
fn a_snapshot_that_cannot_be_taken_changes_nothing() {
    let mut disk = Disk::new(Kind::Hybrid);
    disk.volume = None;
    let stack = Stack::new([disk.folder.path().join("lower.obd")]);
    let (volume, snapshots) =
        common::volume::open(&stack, &disk.paths, Options::default()).unwrap();
    put(&volume, 3, &mut [7; 1024]).unwrap();
    // A folder where the list is to be.
    let list = disk.folder.path().join("upper.data.snapshots");
    fs::create_dir(&list).unwrap();
    assert!(snapshots.take("one").is_err());
    assert!(snapshots.list().is_empty());
    put(&volume, 4, &mut [8; 512]).unwrap();
    fs::remove_dir(&list).unwrap();
    let snapshot = snapshots.take("one").unwrap();
    snapshots.seal().unwrap();
    let image = Image::open(&Stack::new(&snapshot.layers)).unwrap();
    let now = content(&volume);
    assert_eq!((now[3], now[4]), ([7; 512], [8; 512]));
    assert!(content(&Volume::read_only(image)) == now);
}

/// A process that opens what a snapshot froze waits until it is sealed, and takes nothing for a
/// layer before: what the guest wrote may end like one.
#[test]
fn a_layer_that_is_not_sealed_yet_is_waited_for() {
    for kind in KINDS {
        let mut disk = Disk::new(kind);
        disk.volume = None;
        let stack = Stack::new([disk.folder.path().join("lower.obd")]);
        let (volume, snapshots) =
            common::volume::open(&stack, &disk.paths, Options::default()).unwrap();
        let forged = LayerBuilder::new(SECTORS * 512).data(0, &[0xEE; 512]);
        let mut forged = forged.lsmt();
        let mut forge = || put(&volume, SECTORS - forged.len() as u64 / 512, &mut forged).unwrap();
        forge();
        let snapshot = snapshots.take("one").unwrap();
        let now = content(&volume);
        let open = || Image::open(&Stack::new(&snapshot.layers));
        thread::scope(|scope| {
            let others: Vec<_> = (0..3).map(|_| scope.spawn(open)).collect();
            thread::sleep(Duration::from_millis(30));
            assert!(others.iter().all(|other| !other.is_finished()), "{kind:?}");
            snapshots.seal().unwrap();
            for other in others {
                let image = other.join().unwrap().unwrap();
                assert!(content(&Volume::read_only(image)) == now, "{kind:?}");
            }
        });

        // A layer that no process has open is not sealed.
        forge();
        let snapshot = snapshots.take("two").unwrap();
        let unsealed = snapshot.layers.last().unwrap();
        drop((volume, snapshots));
        let error = Image::open(&Stack::new(&snapshot.layers)).unwrap_err();
        assert!(
            matches!(&error, image::Error::Unsealed { layer } if layer == unsealed),
            "{error}"
        );
        drop(common::volume::open(&stack, &disk.paths, Options::default()).unwrap());
        let image = Image::open(&Stack::new(&snapshot.layers)).unwrap();
        assert!(content(&Volume::read_only(image)) == now);
    }
}

/// A process that waits for the files while their user takes a snapshot goes on above that
/// snapshot.
#[test]
fn a_snapshot_taken_while_the_next_process_waits() {
    for pause in [0, 5, 20, 80] {
        let mut disk = Disk::new(Kind::Hybrid);
        disk.volume = None;
        let stack = Stack::new([disk.folder.path().join("lower.obd")]);
        let open = || common::volume::open(&stack, &disk.paths, Options::default());
        let (volume, snapshots) = open().unwrap();
        put(&volume, 3, &mut [7; 512]).unwrap();
        thread::scope(|scope| {
            // A slow machine may take longer than an open waits for the lock.
            let next = scope.spawn(|| {
                let start = Instant::now();
                loop {
                    match open() {
                        Err(Error::Busy { .. }) if start.elapsed() < common::PATIENCE => {}
                        opened => return opened,
                    }
                }
            });
            thread::sleep(Duration::from_millis(pause));
            let snapshot = snapshots.take("one").unwrap();
            put(&volume, 3, &mut [8; 512]).unwrap();
            drop((volume, snapshots));
            let (volume, snapshots) = next.join().unwrap().unwrap();
            assert_eq!(content(&volume)[3], [8; 512]);
            put(&volume, 4, &mut [9; 512]).unwrap();
            assert_eq!(snapshots.list()[0].uuid, snapshot.uuid);
            let image = Image::open(&Stack::new(&snapshot.layers)).unwrap();
            assert_eq!(content(&Volume::read_only(image))[3], [7; 512]);
        });
    }
}

/// One that could not be sealed is sealed before another is taken, or none is.
#[test]
fn snapshots_are_sealed_in_order() {
    let recorder = Recorder::mount();
    let folder = recorder.path();
    lower(folder);
    let paths = Paths {
        data: folder.join("upper.data"),
        index: folder.join("upper.index"),
    };
    create(&paths, Kind::Hybrid, &header()).unwrap();
    let stack = Stack::new([folder.join("lower.obd")]);
    let (volume, snapshots) = common::volume::open(&stack, &paths, Options::default()).unwrap();
    put(&volume, 0, &mut [1; 4096]).unwrap();
    volume.flush().unwrap();
    recorder.fail(Call::Write, "upper.data", Errno::ENOSPC);
    snapshots.take("one").unwrap();
    put(&volume, 8, &mut [2; 4096]).unwrap();
    snapshots.take("two").unwrap();
    snapshots.seal().unwrap_err();
    snapshots.take("three").unwrap_err();
    let sealed = |snapshots: &Snapshots| -> Vec<bool> {
        let list = snapshots.list();
        list.iter().map(|snapshot| snapshot.sealed).collect()
    };
    assert_eq!(
        sealed(&snapshots),
        [false, false],
        "the third changed nothing"
    );
    recorder.heal();
    let three = snapshots.take("three").unwrap();
    assert_eq!(sealed(&snapshots), [true, true, false]);
    snapshots.seal().unwrap();
    let now = content(&volume);
    let image = Image::open(&Stack::new(&three.layers)).unwrap();
    assert!(content(&Volume::read_only(image)) == now);

    // One there is no room to seal is above the others at the next start.
    snapshots.take("four").unwrap();
    let number = 3;
    drop((volume, snapshots));
    recorder.fail(Call::Write, &format!("upper.data.{number}"), Errno::ENOSPC);
    let (volume, snapshots) = common::volume::open(&stack, &paths, Options::default()).unwrap();
    assert!(content(&volume) == now);
    let four = snapshots.list().pop().unwrap();
    assert!(!four.sealed && snapshots.take("five").is_err());
    recorder.heal();
    snapshots.seal().unwrap();
    assert!(snapshots.list().pop().unwrap().sealed);
    let image = Image::open(&Stack::new(&four.layers)).unwrap();
    assert!(content(&Volume::read_only(image)) == now);
}

fn content(volume: &Volume) -> Vec<[u8; 512]> {
    let mut content = vec![[0; 512]; SECTORS as usize];
    let into = content.as_flattened_mut();
    volume.read(&mut Reader::new(), Sector(0), into).unwrap();
    content
}
