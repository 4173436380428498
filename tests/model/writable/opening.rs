//! Layers that are opened: what is torn, what does not belong together, what is in use.

use super::*;

#[test]
fn a_torn_tail_is_cut_off() {
    for kind in KINDS {
        let mut disk = Disk::new(kind);
        disk.write(10, 4);
        disk.flush();
        disk.tear(9);
        disk.check();
        disk.write(12, 30);
        disk.flush();
        disk.lose_power();
        disk.check();
    }
}

#[test]
fn entries_without_data_never_were() {
    for kind in [Kind::Append, Kind::Hybrid] {
        let mut disk = Disk::new(kind);
        disk.write(10, 4);
        disk.flush();
        let before = disk.now.clone();
        disk.write(100, 8);
        disk.flush();
        disk.volume = None;
        let data = File::options().write(true).open(&disk.paths.data).unwrap();
        data.set_len(4096 + 4 * 512).unwrap();
        disk.now = before;
        disk.die();
        disk.check();
        // What is written next takes the place of what is gone, and is not taken for it.
        disk.write(200, 8);
        disk.flush();
        disk.die();
        disk.check();
    }
}

#[test]
fn one_process_at_a_time() {
    let disk = Disk::new(Kind::Hybrid);
    let second = open(disk.folder.path(), &disk.paths, u64::MAX);
    assert!(matches!(second, Err(Error::Busy { .. })));
}

#[test]
fn files_that_do_not_belong_together_are_refused() {
    let (one, other) = (Disk::new(Kind::Hybrid), Disk::new(Kind::Hybrid));
    let paths = Paths {
        data: one.paths.data.clone(),
        index: other.paths.index.clone(),
    };
    drop(one.volume);
    let mixed = open(one.folder.path(), &paths, u64::MAX);
    assert!(matches!(mixed, Err(Error::NoPair { .. })), "{mixed:?}");
    let twice = create(&other.paths, Kind::Hybrid, &header());
    assert!(matches!(twice, Err(Error::File { .. })));
}

/// A layer below another device is not one that is written to.
#[test]
fn a_layer_in_use_is_refused() {
    let disk = Disk::new(Kind::Hybrid);
    let error = Image::open(&Stack::new([&disk.paths.data])).unwrap_err();
    assert!(matches!(error, image::Error::InUse { .. }), "{error}");
}
