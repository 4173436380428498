//! Writable layers as upstream's tools left them: what they hold, and that opening them to write
//! keeps it.

#[path = "common/golden.rs"]
mod golden;

use golden::Case;
use ovbd_vhost::image::Image;
use ovbd_vhost::image::reader::Reader;
use ovbd_vhost::image::spec::Stack;
use ovbd_vhost::scatter::Scatter;
use ovbd_vhost::units::Sector;
use ovbd_vhost::upper::{Options, Paths, Upper, Volume};
use sha2::{Digest, Sha256};
use vm_memory::VolatileSlice;

fn open(case: &Case, paths: &Paths) -> Volume {
    let image = Image::open(&Stack::new(&case.layers)).unwrap();
    let options = Options {
        default_size: image.size(),
        ..Options::default()
    };
    Volume::writable(image, vec![Upper::open(paths, &options).unwrap()])
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
            let bytes = &mut expected[start as usize * 512..][..sectors as usize * 512];
            bytes.fill(start as u8);
            let mut scatter = Scatter::new();
            scatter.push(VolatileSlice::from(bytes));
            let cursor = scatter.cursor(0);
            volume.write(Sector(start), sectors, cursor).unwrap();
        }
        volume.discard(Sector(1040), 3000).unwrap();
        expected[1040 * 512..4040 * 512].fill(0);
        volume.flush().unwrap();
        drop(volume);
        assert!(content(&open(&case, &paths)) == expected, "{}", case.name);
    }
}
