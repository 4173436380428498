//! The disk that the crash tests work on: a writable layer over a layer that holds [`BELOW`]
//! everywhere.

use common::volume::BlockingIo as _;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::layers::{self, LayerBuilder};
use common::recorder::{Op, Recorder, after_kill};
use ovbd_vhost::format::lsmt::writable::Kind;
use ovbd_vhost::image::Image;
use ovbd_vhost::image::config::Stack;
use ovbd_vhost::image::reader::Reader;
use ovbd_vhost::io::scatter::Scatter;
use ovbd_vhost::units::Sector;
use ovbd_vhost::writable::{Error, Paths, Snapshots, Volume, create};
use tempfile::TempDir;
use uuid::Uuid;
use vm_memory::VolatileSlice;

/// Content of a sector.
pub(crate) type Content = [u8; 512];

/// What a sector reads as where the writable layer has nothing.
pub(crate) const BELOW: Content = [0xBB; 512];

/// The files of the writable layer in `folder`.
pub(crate) fn paths(folder: &Path) -> Paths {
    Paths {
        data: folder.join("data"),
        index: folder.join("index"),
    }
}

/// A layer of so many sectors that holds [`BELOW`] everywhere.
pub(crate) fn below(sectors: u64) -> (TempDir, Stack) {
    let folder = tempfile::tempdir().unwrap();
    let content = vec![BELOW; sectors as usize];
    let layer = LayerBuilder::new(sectors * 512).data(0, content.as_flattened());
    let path = layers::write(folder.path(), "below.obd", &layer.lsmt());
    (folder, Stack::new([path]))
}

/// Makes an empty writable layer in the recorder's folder.
pub(crate) fn make(recorder: &Recorder, kind: Kind, sectors: u64) {
    let header = layers::upper_header(sectors * 512, Uuid::new_v4());
    create(&paths(recorder.path()), kind, &header).unwrap();
}

/// Writes sectors from `start` on.
pub(crate) fn write(volume: &Volume, start: Sector, content: &mut [Content]) -> Result<(), Error> {
    let range = common::sectors(start.0, content.len() as u64);
    let mut scatter = Scatter::new();
    scatter.push(VolatileSlice::from(content.as_flattened_mut()));
    volume.write(range, scatter.cursor(0))
}

/// What all sectors hold.
pub(crate) fn content(volume: &Volume) -> Vec<Content> {
    let mut content = vec![BELOW; volume.sectors().0 as usize];
    let into = content.as_flattened_mut();
    volume.read(&mut Reader::new(), Sector(0), into).unwrap();
    content
}

/// Gives the running system another name than the one in the journals.
pub(crate) fn start_machine(folder: &Path) {
    for file in fs::read_dir(folder).unwrap() {
        let path = file.unwrap().path();
        let extension = path.extension().unwrap_or_default();
        if extension.to_string_lossy().starts_with("journal") {
            let file = File::options().write(true).open(path).unwrap();
            file.write_all_at(b"another start", 8).unwrap();
        }
    }
}

/// Where the crashes' leftovers are written: in memory, for there are thousands.
pub(crate) fn leftovers() -> TempDir {
    let memory = Path::new("/dev/shm");
    match memory.is_dir() {
        true => tempfile::tempdir_in(memory).unwrap(),
        false => tempfile::tempdir().unwrap(),
    }
}

/// What is left when the process dies after it did what `log` says.
pub(crate) fn folder_after(log: &[Op]) -> TempDir {
    let folder = leftovers();
    after_kill(log, folder.path());
    folder
}

/// Asserts that the snapshot of this name exists and holds `expected`.
pub(crate) fn assert_holds(
    snapshots: &Snapshots,
    name: &str,
    expected: &[Content],
    when: &dyn Fn() -> String,
) {
    let list = snapshots.list();
    let found = list.iter().find(|found| found.name == name);
    let found = found.unwrap_or_else(|| panic!("{}: no {name} in {list:?}", when()));
    let image = Image::open(&Stack::new(&found.layers)).unwrap();
    let held = content(&Volume::read_only(image));
    assert!(held == expected, "{}: {name}", when());
}
