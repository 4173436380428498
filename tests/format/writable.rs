//! Writable layers as upstream's tools left them: what they hold, and that opening them to write
//! keeps it.

use common::volume::BlockingIo as _;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use common::golden::{self, Case};
use ovbd_vhost::format::lsmt::writable::Kind;
use ovbd_vhost::format::lsmt::{Header, Mapping};
use ovbd_vhost::image::Image;
use ovbd_vhost::image::config::Stack;
use ovbd_vhost::image::reader::Reader;
use ovbd_vhost::io::scatter::Scatter;
use ovbd_vhost::units::Sector;
use ovbd_vhost::writable::{Options, Paths, Volume, WritableLayer, create, journal};
use sha2::{Digest, Sha256};
use vm_memory::VolatileSlice;

fn open(case: &Case, paths: &Paths) -> Volume {
    let image = Image::open(&Stack::new(&case.layers)).unwrap();
    let upper = WritableLayer::open(paths, Some(image.size()), &Options::default()).unwrap();
    Volume::writable(image, upper)
}

fn content(volume: &Volume) -> Vec<u8> {
    let mut bytes = vec![0; volume.size() as usize];
    let mut reader = Reader::new();
    for (part, at) in bytes.chunks_mut(1 << 20).zip((0..).step_by(2048)) {
        volume.read(&mut reader, Sector(at), part).unwrap();
    }
    bytes
}

fn sha256(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Fills sectors of a disk, and of what it is expected to hold.
fn write(volume: &Volume, expected: &mut [u8], start: u64, sectors: u64, byte: u8) {
    let bytes = &mut expected[start as usize * 512..][..sectors as usize * 512];
    bytes.fill(byte);
    let mut scatter = Scatter::new();
    scatter.push(VolatileSlice::from(bytes));
    let cursor = scatter.cursor(0);
    volume
        .write(common::sectors(start, sectors), cursor)
        .unwrap();
}

#[test]
fn they_hold_what_upstream_says_and_keep_it() {
    let cases: Vec<_> = golden::cases()
        .into_iter()
        .filter(|case| case.has_upper)
        .collect();
    assert!(
        cases.len() >= 4,
        "append, sparse, sparse with discards, empty"
    );
    for case in cases {
        let folder = tempfile::tempdir().unwrap();
        let paths = golden::copy_upper(&case, folder.path());
        let mut expected = {
            let volume = open(&case, &paths);
            let found = content(&volume);
            assert_eq!(volume.size(), case.size, "{}", case.name);
            assert_eq!(sha256(&found), case.sha256, "{}", case.name);
            found
        };
        // The first opening may have written the map down: the second goes by that.
        let volume = open(&case, &paths);
        assert!(content(&volume) == expected, "{}", case.name);
        for (start, sectors) in [(3, 1), (1000, 77), (40_000, 256)] {
            write(&volume, &mut expected, start, sectors, start as u8);
        }
        volume.discard(common::sectors(1040, 3000)).unwrap();
        expected[1040 * 512..4040 * 512].fill(0);
        volume.flush().unwrap();
        drop(volume);
        assert!(content(&open(&case, &paths)) == expected, "{}", case.name);
    }
}

/// A process of ours is killed, another tool goes on with the layer as the index has it, and then we
/// do: what we had not flushed is not to come back over what was written since.
#[test]
fn what_others_wrote_since_outlives_the_journal() {
    let case = golden::find("10h-upper-empty");
    let image = || Image::open(&Stack::new(&case.layers)).unwrap();
    for (kind, flushes) in [Kind::Append, Kind::Hybrid]
        .into_iter()
        .flat_map(|kind| (0..3).map(move |flushes| (kind, flushes)))
    {
        let folder = tempfile::tempdir().unwrap();
        let paths = Paths {
            data: folder.path().join("data"),
            index: folder.path().join("index"),
        };
        let header = Header::empty(image().size(), uuid::Uuid::from_u128(3), Default::default());
        create(&paths, kind, &header).unwrap();
        let volume = open(&case, &paths);
        let mut flushed = content(&volume);
        for number in 0..flushes {
            write(&volume, &mut flushed, 8 * number, 20, number as u8);
            volume.flush().unwrap();
        }
        let mut answered = flushed.clone();
        for (start, sectors) in [(200, 8), (100, 4), (300, 8)] {
            write(&volume, &mut answered, start, sectors, 0x55);
        }
        drop(volume);
        let index = File::options().write(true).open(&paths.index).unwrap();
        let data = File::options().write(true).open(&paths.data).unwrap();
        let append = |file: &File, bytes: &[u8]| {
            let end = file.metadata().unwrap().len();
            file.write_all_at(bytes, end).unwrap();
            Sector(end / 512)
        };
        let copy = |name: &str| {
            let folder = tempfile::tempdir_in(folder.path()).unwrap();
            for entry in fs::read_dir(paths.data.parent().unwrap()).unwrap() {
                let path = entry.unwrap().path();
                if path.is_file() {
                    fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
                }
            }
            let file = |file: &str| folder.path().join(file);
            let paths = Paths {
                data: file("data"),
                index: file("index"),
            };
            let found = content(&open(&case, &paths));
            (found, format!("{kind:?}, {flushes} flushes, {name}"))
        };
        // A flush that was cut short appends what the journal begins with.
        let (found, what) = copy("killed");
        assert!(found == answered, "{what}");
        let boot = journal::boot_id();
        let waiting = journal::read(&paths.index, header.uuid, boot).unwrap();
        append(&index, &waiting.mappings[0].1.encode());
        let (found, what) = copy("killed while it flushed");
        assert!(found == answered, "{what}");

        let at = append(&data, &[0x66; 3 * 512]);
        append(&index, &Mapping::data(Sector(101), 3, at).unwrap().encode());
        let mut expected = flushed.clone();
        expected[200 * 512..208 * 512].fill(0x55);
        expected[101 * 512..104 * 512].fill(0x66);
        let (found, what) = copy("another wrote");
        assert!(found == expected, "{what}");
    }
}
