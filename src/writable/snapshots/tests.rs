//! The list of layers in the volume and its written form.

use vm_memory::VolatileSlice;

use super::super::manifest::manifest_path;
use super::*;
use crate::format::lsmt::writable::Kind;
use crate::image::OpenStack;
use crate::image::config::Stack;
use crate::io::scatter::Scatter;
use crate::units::{Sector, SectorRange};

/// A disk in a directory of its own.
struct Disk {
    folder: tempfile::TempDir,
}

impl Disk {
    fn new() -> Self {
        let disk = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        let header = Header::empty(1 << 20, Uuid::new_v4(), Uuid::nil());
        create(&disk.paths(), Kind::Hybrid, &header).unwrap();
        disk
    }

    fn paths(&self) -> Paths {
        Paths {
            data: self.folder.path().join("data"),
            index: self.folder.path().join("index"),
        }
    }

    fn open(&self) -> (Arc<Volume>, Snapshots) {
        let stack = Stack::default();
        Snapshots::load(
            &stack,
            OpenStack::empty(stack.lineage()),
            &self.paths(),
            Options::default(),
        )
        .unwrap()
    }

    /// Checks that the manifest is the written form of the list in the volume.
    fn check(&self, volume: &Volume) {
        let written = Manifest::load(&manifest_path(&self.paths())).unwrap();
        let file = ManifestFile::new(&self.paths(), &written);
        let listed = volume.above().unwrap().manifest(file.unused());
        assert_eq!(listed, written);
    }
}

fn sealed(snapshots: &Snapshots) -> Vec<(String, bool)> {
    let list = snapshots.list().into_iter();
    list.map(|snapshot| (snapshot.name, snapshot.sealed))
        .collect()
}

/// The list holds snapshots in each of their three places: in the image, folded, and frozen.
#[test]
fn the_manifest_is_the_list_of_layers() {
    let disk = Disk::new();
    for round in ["a", "b", "c"] {
        let (volume, snapshots) = disk.open();
        disk.check(&volume);
        let before = sealed(&snapshots);
        assert!(before.iter().all(|(_, sealed)| *sealed));
        let mut expected = before;
        for (number, seals) in [true, false].into_iter().enumerate() {
            let range = SectorRange::new(Sector(0), Sector(1));
            let mut bytes = [1; 512];
            let mut scatter = Scatter::new();
            scatter.push(VolatileSlice::from(&mut bytes[..]));
            volume.write_now(range, scatter.cursor(0)).unwrap();
            let name = format!("{round}{number}");
            let taken = snapshots.take(&name).unwrap();
            assert_eq!(snapshots.list().last(), Some(&taken));
            disk.check(&volume);
            if seals {
                snapshots.seal().unwrap();
                disk.check(&volume);
            }
            expected.push((name, seals));
            assert_eq!(sealed(&snapshots), expected);
        }
    }
}
