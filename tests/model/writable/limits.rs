//! Layers that are full, and space that is used again.

use super::*;

/// Where no shorter index can be made, a full one fails the flush, and says what to do.
#[test]
fn an_index_that_is_full() {
    let mut disk = Disk::new(Kind::Hybrid);
    disk.volume = None;
    let options = Options {
        bounds: Bounds {
            index_slack: 1000,
            max_index_entries: 30,
            ..Bounds::default()
        },
        ..Options::default()
    };
    let upper = WritableLayer::open(&disk.paths, None, &options).unwrap();
    let new = disk.folder.path().join("upper.index.new");
    for round in 0..200 {
        // Each takes a mapping.
        upper.discard(common::sectors(0, 1)).unwrap();
        let mut bytes = [round; 512];
        let mut scatter = Scatter::new();
        scatter.push(VolatileSlice::from(&mut bytes[..]));
        upper
            .write(common::sectors(0, 1), scatter.cursor(0))
            .unwrap();
        if round == 100 {
            fs::create_dir(&new).unwrap();
        }
        match upper.flush() {
            Ok(()) => assert!(fs::metadata(&disk.paths.index).unwrap().len() <= 4096 + 30 * 16),
            Err(error) => {
                assert!(round > 100, "{error}");
                let said = error.to_string();
                assert!(
                    said.contains("index has") && said.contains("directory"),
                    "{said}"
                );
                fs::remove_dir(&new).unwrap();
                upper.flush().unwrap();
                return;
            }
        }
    }
    panic!("it is never full");
}

#[test]
fn rewriting_takes_no_more_space() {
    for kind in [Kind::Append, Kind::Hybrid] {
        let mut disk = Disk::new(kind);
        for round in 0..50 {
            disk.write(0, 64);
            if round % 3 == 0 {
                disk.zero(0, 64, true, true);
                disk.write(0, 64);
            }
            disk.flush();
        }
        let len = fs::metadata(&disk.paths.data).unwrap().len();
        assert!(len <= 4096 + 3 * 64 * 512, "{kind:?}: {len}");
        let upper = disk.volume().layers()[0].clone();
        assert_eq!((upper.extents(), upper.used()), (1, 64 * 512));
    }
}

#[test]
fn full_is_an_error_that_passes() {
    let mut disk = Disk::new(Kind::Hybrid);
    disk.volume = None;
    disk.volume = Some(open(disk.folder.path(), &disk.paths, 16 * 512).unwrap());
    disk.write(0, 16);
    let full = put(disk.volume(), 20, &mut [1; 4096]);
    assert!(
        matches!(full, Err(Error::Full { limit: 8192, .. })),
        "{full:?}"
    );
    disk.write(4, 8);
    disk.check();
    disk.zero(0, 8, true, true);
    disk.write(20, 8);
    disk.check();
}

/// Discarded space is free once no request reads it any more; no request waits for that without
/// end.
#[test]
fn full_passes_when_a_request_ends() {
    let mut disk = Disk::new(Kind::Hybrid);
    disk.volume = None;
    disk.volume = Some(open(disk.folder.path(), &disk.paths, 16 * 512).unwrap());
    disk.write(0, 8);
    disk.write(40, 8);
    let mut reading = Lookup::default();
    disk.volume().lookup(common::sectors(40, 8), &mut reading);
    disk.zero(0, 8, true, true);
    disk.flush();
    let mut bytes = [1; 4096];
    let mut scatter = Scatter::new();
    scatter.push(VolatileSlice::from(&mut bytes[..]));
    let now = || {
        disk.volume()
            .write_now(common::sectors(60, 8), scatter.cursor(0))
    };
    let flush_first = matches!(
        now(),
        Err(Error::Full {
            will_free: true,
            ..
        })
    );
    assert!(flush_first);
    let full = disk
        .volume()
        .write(common::sectors(60, 8), scatter.cursor(0));
    assert!(matches!(full, Err(Error::Full { .. })), "{full:?}");
    drop(reading);
    now().unwrap();
}
