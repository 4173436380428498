//! What must be durable before what.

use super::*;

/// An index that points past the end of the data, as one whose data was never durable does, does
/// not come to point at what is appended, however far sealing or resizing got.
#[test]
fn what_is_appended_is_no_data() {
    for kind in [Kind::Append, Kind::Hybrid, Kind::Sparse] {
        let recorder = Recorder::mount();
        let (_folder, stack) = below(SECTORS);
        make(&recorder, kind, SECTORS);
        let paths = paths(recorder.path());
        let (volume, _) = open(recorder.path(), &stack);
        write(&volume, Sector(10), &mut [[1; 512]; 8]).unwrap();
        write(&volume, Sector(90), &mut [[2; 512]]).unwrap();
        volume.flush().unwrap();
        drop(volume);
        let sectors = match kind {
            Kind::Sparse => 90,
            _ => 8,
        };
        let data = File::options().write(true).open(&paths.data).unwrap();
        data.set_len(4096 + sectors * 512).unwrap();
        drop(data);
        let began = recorder.position();
        match kind {
            Kind::Sparse => drop(resize(&paths, 2 * SECTORS * 512, false).unwrap()),
            _ => drop(seal(&paths).unwrap()),
        }
        let mut expected = vec![BELOW; SECTORS as usize];
        expected[10..18].fill([1; 512]);
        let log = recorder.log();
        assert!(log.len() > began + 5);
        for at in began..=log.len() {
            let folder = folder_after(&log[..at]);
            let data = self::paths(folder.path()).data;
            let opened = common::volume::open(&stack, &self::paths(folder.path()), OPTIONS);
            let volume = match opened {
                Err(Error::Sealed { .. }) => {
                    let data = data.clone().into();
                    let layers = stack.layers().iter().chain([&data]);
                    Volume::read_only(Image::open(&Stack::new(layers)).unwrap()).into()
                }
                opened => opened.unwrap().0,
            };
            let found = content(&volume);
            assert!(
                found[..SECTORS as usize] == expected,
                "{kind:?}: killed at {at}"
            );
        }
    }
}

/// A process is killed before the name of its new index, or of its files, is durable. What the next
/// one answers a flush for is there all the same after a power loss.
#[test]
fn names_that_were_not_durable() {
    let killed_after = |last: fn(&Op) -> bool| {
        let recorder = Recorder::mount();
        let (_folder, stack) = below(SECTORS);
        make(&recorder, Kind::Hybrid, SECTORS);
        for round in 0..40_u8 {
            let (volume, _) = open(recorder.path(), &stack);
            for sector in [0, 2, 1, 0, 2, 1] {
                write(&volume, Sector(sector), &mut [[round; 512]]).unwrap();
                volume.discard(common::sectors(sector, 1)).unwrap();
            }
            volume.flush().unwrap();
        }
        let log = recorder.log();
        let steps = log.iter().zip(&log[1..]).enumerate();
        let unsynced = steps.filter(|(_, (op, next))| last(op) && matches!(next, Op::SyncFolder));
        let cuts: Vec<_> = unsynced.map(|(at, _)| at + 1).collect();
        assert!(!cuts.is_empty());
        // Everything but the sync came before the kill: what the next process sees is the same.
        let (volume, _) = open(recorder.path(), &stack);
        write(&volume, Sector(50), &mut [[99; 512]]).unwrap();
        volume.flush().unwrap();
        let mut log = recorder.log();
        for cut in cuts.into_iter().rev() {
            log.remove(cut);
        }
        let folder = leftovers();
        after_power_loss(&log, folder.path(), || false);
        start_machine(folder.path());
        assert_eq!(content(&open(folder.path(), &stack).0)[50], [99; 512]);
    };
    killed_after(|op| matches!(op, Op::Rename { .. }));
    killed_after(|op| matches!(op, Op::Link { .. } | Op::Remove { .. }));
}

/// While the folder with a new list is made durable, writes go on; what says that they last waits.
#[test]
fn writes_do_not_wait_until_the_list_lasts() {
    let recorder = Recorder::mount();
    let (_folder, stack) = below(SECTORS);
    make(&recorder, Kind::Hybrid, SECTORS);
    let (volume, snapshots) = open(recorder.path(), &stack);
    write(&volume, Sector(0), &mut [[1; 512]]).unwrap();
    volume.flush().unwrap();
    let mut expected = vec![vec![BELOW]; SECTORS as usize];
    expected[0] = vec![[1; 512]];
    let mut random = Random::new(7);
    // The journal of the new layer is its last file: the next sync is that of the list.
    let held = recorder.hold_folder_syncs("index.1.journal0");
    thread::scope(|scope| {
        let taken = scope.spawn(|| snapshots.take("one").map(drop));
        held.wait();
        write(&volume, Sector(1), &mut [[2; 512]]).unwrap();
        let flushed = scope.spawn(|| volume.flush());
        let sealed = scope.spawn(|| snapshots.seal());
        let waiting = [taken, flushed, sealed];
        thread::sleep(Duration::from_millis(50));
        assert!(waiting.iter().all(|thread| !thread.is_finished()));

        let log = recorder.log();
        expected[1] = vec![[2; 512]];
        let killed = folder_after(&log);
        check(killed.path(), &stack, &expected, None, || "killed".into());
        expected[1] = vec![BELOW, [2; 512]];
        for luck in 0..20 {
            let folder = leftovers();
            after_power_loss(&log, folder.path(), || match luck {
                0 => false,
                1 => true,
                _ => random.coin(),
            });
            start_machine(folder.path());
            check(folder.path(), &stack, &expected, None, || {
                format!("no power, luck {luck}")
            });
        }
        drop(held);
        for thread in waiting {
            thread.join().unwrap().unwrap();
        }
    });
    let now = content(&volume);
    expected[1] = vec![[2; 512]];
    let folder = leftovers();
    after_power_loss(&recorder.log(), folder.path(), || false);
    start_machine(folder.path());
    let snapshot = ("one".to_owned(), {
        let mut held = now;
        held[1] = BELOW;
        held
    });
    check(folder.path(), &stack, &expected, Some(&snapshot), || {
        "no power afterwards".into()
    });
}

/// What the index points at is not written to before it points elsewhere, also when the layer
/// is opened meanwhile.
#[test]
fn space_is_not_used_again_before_a_flush() {
    for kind in [Kind::Append, Kind::Hybrid] {
        let recorder = Recorder::mount();
        let (_folder, stack) = below(SECTORS);
        make(&recorder, kind, SECTORS);
        let (volume, _) = open(recorder.path(), &stack);
        write(&volume, Sector(0), &mut [[1; 512]; 8]).unwrap();
        volume.flush().unwrap();
        fill(&recorder);
        volume.discard(common::sectors(0, 8)).unwrap();
        drop(volume);
        let (volume, _) = open(recorder.path(), &stack);
        write(&volume, Sector(40), &mut [[2; 512]; 8]).unwrap();
        let folder = leftovers();
        after_power_loss(&recorder.log(), folder.path(), || true);
        start_machine(folder.path());
        let mut expected = vec![vec![BELOW]; SECTORS as usize];
        expected[..8].fill(vec![[0; 512], [1; 512]]);
        expected[40..48].fill(vec![BELOW, [2; 512]]);
        check(folder.path(), &stack, &expected, None, || {
            format!("{kind:?}")
        });

        recorder.heal();
        volume.flush().unwrap();
        write(&volume, Sector(60), &mut [[3; 512]; 8]).unwrap();
        let len = fs::metadata(paths(recorder.path()).data).unwrap().len();
        assert_eq!(len, 4096 + 16 * 512, "what is free is used");
    }
}
