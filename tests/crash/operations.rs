//! Sealing and resizing in place, and growing in use, with a crash after each single step: the layer holds
//! what it held, and doing it again does the rest.

use std::fs;
use std::path::Path;

use common::content::Random;
use common::recorder::{Op, Recorder, after_kill, after_power_loss};
use ovbd_vhost::format::lsmt::Header;
use ovbd_vhost::format::lsmt::writable::Kind;
use ovbd_vhost::image::config::Stack;
use ovbd_vhost::image::reader::Reader;
use ovbd_vhost::io::scatter::Scatter;
use ovbd_vhost::tool::loaded_stack::LoadedStack;
use ovbd_vhost::tool::open_files::StackFiles;
use ovbd_vhost::tool::seal::{Sealed, seal};
use ovbd_vhost::units::Sector;
use ovbd_vhost::writable::extent_map::ExtentMap;
use ovbd_vhost::writable::load::{Access, load};
use ovbd_vhost::writable::{Error, Options, Paths, WritableLayer, create, resize};
use uuid::Uuid;
use vm_memory::VolatileSlice;

const KINDS: [Kind; 3] = [Kind::Append, Kind::Sparse, Kind::Hybrid];
const SECTORS: u64 = 96;

fn paths(folder: &Path) -> Paths {
    Paths {
        data: folder.join("data"),
        index: folder.join("index"),
    }
}

/// Makes a writable layer in `folder` and writes to it; all is durable in the end, or only
/// answered.
fn work(folder: &Path, kind: Kind, durable: bool) {
    let header = Header::empty(SECTORS * 512, Uuid::from_u128(1), Uuid::nil());
    create(&paths(folder), kind, &header).unwrap();
    let options = Options::default();
    let upper = WritableLayer::open(&paths(folder), None, &options).unwrap();
    for (number, (start, sectors)) in [(0, 20), (70, 26), (5, 3), (30, 9), (90, 6)]
        .into_iter()
        .enumerate()
    {
        let mut bytes = vec![number as u8 + 1; sectors as usize * 512];
        let mut scatter = Scatter::new();
        scatter.push(VolatileSlice::from(&mut bytes[..]));
        upper
            .write(common::sectors(start, sectors), scatter.cursor(0))
            .unwrap();
        if number == 2 {
            upper.flush().unwrap();
        }
    }
    upper.discard(common::sectors(12, 6)).unwrap();
    if durable {
        upper.flush().unwrap();
    }
}

/// What the layer in `folder` holds, sealed or not, and whether it is.
fn content(folder: &Path) -> (Vec<u8>, bool) {
    let Paths { data, index } = paths(folder);
    let paths = paths(folder);
    let sealed = match load(&paths, Access::Read, ExtentMap::new()) {
        Err(Error::Sealed { .. }) => true,
        loaded => {
            loaded.unwrap();
            false
        }
    };
    assert!(sealed || index.exists());
    let files = match sealed {
        true => StackFiles {
            stack: Stack::new([data]),
            upper: None,
        },
        false => StackFiles {
            stack: Stack::default(),
            upper: Some(paths),
        },
    };
    let stack = LoadedStack::load(files.open().unwrap()).unwrap();
    let mut bytes = vec![0xEE; stack.size() as usize];
    stack
        .read(&mut Reader::new(), Sector(0), &mut bytes)
        .unwrap();
    (bytes, sealed)
}

/// Calls `check` with what each crash from step `from` on may leave.
fn crash_everywhere(log: &[Op], from: usize, durable: bool, mut check: impl FnMut(&Path, usize)) {
    let mut random = Random::new(7);
    for at in from..=log.len() {
        let folder = tempfile::tempdir().unwrap();
        after_kill(&log[..at], folder.path());
        check(folder.path(), at);
        for luck in 0..if durable { 6 } else { 0 } {
            let folder = tempfile::tempdir().unwrap();
            after_power_loss(&log[..at], folder.path(), || {
                luck == 0 || (luck > 1 && random.coin())
            });
            check(folder.path(), at);
        }
    }
}

#[test]
fn sealing_cut_short() {
    for (kind, durable) in KINDS.map(|kind| [(kind, true), (kind, false)]).concat() {
        let recorder = Recorder::mount();
        work(recorder.path(), kind, durable);
        let (expected, sealed) = content(recorder.path());
        assert!(!sealed && expected[..512] == [1; 512] && expected[12 * 512] == 0);
        let began = recorder.position();
        let sealed = seal(&paths(recorder.path())).unwrap();
        assert!(matches!(sealed, Sealed::Now(_)), "{sealed:?}");
        let log = recorder.log();
        let (mut before, mut after) = (0, 0);
        crash_everywhere(&log, began, durable, |folder, at| {
            let (found, sealed) = content(folder);
            assert!(found == expected, "{kind:?} at {at} of {}", log.len());
            *(if sealed { &mut after } else { &mut before }) += 1;
            let again = seal(&paths(folder)).unwrap();
            assert_eq!(again == Sealed::Before, sealed, "{kind:?} at {at}");
            assert_eq!(content(folder), (expected.clone(), true));
            let names = fs::read_dir(folder).unwrap().count();
            assert_eq!(names, 1, "only the data file is left");
        });
        assert!(before > 0 && after > 0);
    }
}

#[test]
fn resizing_cut_short() {
    for (kind, durable) in KINDS.map(|kind| [(kind, true), (kind, false)]).concat() {
        for (size, cut) in [(200, false), (96, false), (50, true)] {
            let recorder = Recorder::mount();
            work(recorder.path(), kind, durable);
            let (old, _) = content(recorder.path());
            let mut new = old.clone();
            new.resize(size as usize * 512, 0);
            let began = recorder.position();
            let found = resize(&paths(recorder.path()), size * 512, cut).unwrap();
            assert_eq!(found, SECTORS * 512);
            assert!(content(recorder.path()).0 == new);
            let log = recorder.log();
            crash_everywhere(&log, began, durable, |folder, at| {
                let (found, _) = content(folder);
                let common = found.len().min(new.len());
                let whole = found == old || found == new;
                assert!(
                    whole || cut && found[..common] == new[..common],
                    "{kind:?} to {size} at {at} of {}",
                    log.len()
                );
                resize(&paths(folder), size * 512, cut).unwrap();
                assert!(content(folder).0 == new, "{kind:?} to {size} again at {at}");
            });
        }
    }
}

#[test]
fn growing_in_use_cut_short() {
    let grow = |folder: &Path| {
        let files = paths(folder);
        let device = common::volume::open(&Stack::default(), &files, Options::default());
        let (volume, snapshots) = device.unwrap();
        snapshots.grow_disk(200 * 512).unwrap();
        assert_eq!(volume.size(), 200 * 512);
    };
    for (kind, durable) in KINDS.map(|kind| [(kind, true), (kind, false)]).concat() {
        let recorder = Recorder::mount();
        work(recorder.path(), kind, durable);
        let (old, _) = content(recorder.path());
        let mut new = old.clone();
        new.resize(200 * 512, 0);
        let began = recorder.position();
        grow(recorder.path());
        assert!(content(recorder.path()).0 == new);
        let log = recorder.log();
        let (mut before, mut after) = (0, 0);
        crash_everywhere(&log, began, durable, |folder, at| {
            let (found, _) = content(folder);
            *(if found == old {
                &mut before
            } else {
                &mut after
            }) += 1;
            let whole = found == old || found == new;
            assert!(whole, "{kind:?} at {at} of {}", log.len());
            grow(folder);
            assert!(content(folder).0 == new, "{kind:?} again at {at}");
        });
        assert!(before > 0 && after > 0);
    }
}
