//! Writable layers with any index and journal: what opens reads the same after a write, a flush and
//! another opening, but for what was written.
//!
//! An input is a byte with the kind, one with the size of the disk, one with the sectors of data,
//! one with the length of the journal in records, the journal and the entries of the index.
#![no_main]

use common::volume::BlockingIo as _;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::layers::LayerBuilder;
use libfuzzer_sys::fuzz_target;
use ovbd_vhost::format::lsmt::Header;
use ovbd_vhost::format::lsmt::writable::{Kind, encode_index_header};
use ovbd_vhost::image::Image;
use ovbd_vhost::image::config::Stack;
use ovbd_vhost::image::reader::Reader;
use ovbd_vhost::io::scatter::Scatter;
use ovbd_vhost::units::{Sector, SectorRange, Sectors};
use ovbd_vhost::writable::{Bounds, Options, Paths, Volume, WritableLayer, create, journal};
use vm_memory::VolatileSlice;

#[path = "../file.rs"]
mod file;

/// Opens the layer above an empty image.
fn open(paths: &Paths) -> Option<Volume> {
    let options = Options {
        bounds: Bounds {
            index_slack: 4,
            ..Bounds::default()
        },
        ..Options::default()
    };
    let upper = WritableLayer::open(paths, Some(1 << 20), &options).ok()?;
    let held = file::Held::new(&LayerBuilder::new(1 << 20).lsmt());
    let image = Image::open(&Stack::new([held.path()])).expect("an empty layer");
    Some(Volume::writable(image, upper))
}

/// Sixteen sectors at each place, or as many as there are.
fn read(volume: &Volume, places: &[u64]) -> Vec<Option<Vec<u8>>> {
    let mut reader = Reader::new();
    let sectors = volume.sectors().0;
    let read = |start: &u64| {
        let start = *start % sectors;
        let mut bytes = vec![0xEE; 512 * (sectors - start).min(16) as usize];
        let read = volume.read(&mut reader, Sector(start), &mut bytes);
        read.ok().map(|()| bytes)
    };
    places.iter().map(read).collect()
}

fuzz_target!(|bytes: &[u8]| {
    let [kind, size, data, records, entries @ ..] = bytes else {
        return;
    };
    let folder = file::folder();
    let paths = Paths {
        data: folder.path().join("data"),
        index: folder.path().join("index"),
    };
    let kind = [Kind::Append, Kind::Hybrid, Kind::Sparse][usize::from(kind % 3)];
    let header = Header {
        index_offset: 0,
        index_entries: 0,
        virtual_size: 512 << (size % 40),
        uuid: uuid::Uuid::from_u128(7),
        parent_uuid: Default::default(),
        message: Vec::new(),
    };
    if create(&paths, kind, &header).is_err() {
        return;
    }
    let write = |path: &Path, bytes: &[u8], at: u64| {
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(path);
        file.and_then(|file| file.write_all_at(bytes, at))
            .expect("file");
    };
    let len = entries.len().min(usize::from(*records) * 32);
    let (journal, entries) = entries.split_at(len);
    if !entries.is_empty() {
        write(&paths.index, &encode_index_header(&header), 0); // a new sparse layer has none
    }
    write(&paths.index, entries, 4096);
    if kind != Kind::Sparse {
        write(&paths.data, &vec![0x77; 512 * usize::from(*data)], 4096);
    }
    write(&journal::paths(&paths.index)[0], journal, 0);

    let Some(volume) = open(&paths) else { return };
    let sectors = volume.sectors().0;
    let starts = entries.chunks_exact(16).map(|entry| {
        let word: [u8; 8] = std::array::from_fn(|at| entry[at]);
        (u64::from_le_bytes(word) & ((1 << 50) - 1)).saturating_sub(3)
    });
    let places: Vec<u64> = starts.chain([0, sectors - 1]).take(40).collect();
    let before = read(&volume, &places);
    let mut sector = [0x99; 512];
    let at = Sector(places[0] % sectors);
    let mut scatter = Scatter::new();
    scatter.push(VolatileSlice::from(&mut sector[..]));
    let written = volume
        .write(SectorRange::new(at, at + Sectors(1)), scatter.cursor(0))
        .is_ok()
        && volume.flush().is_ok();
    let after = read(&volume, &places);
    drop(volume);
    let volume = open(&paths).expect("what was open once");
    assert_eq!(read(&volume, &places), after, "after another opening");
    for ((start, before), after) in places.iter().zip(before).zip(after) {
        let (Some(before), Some(after)) = (before, after) else {
            continue;
        };
        for (sector, (before, after)) in
            (start % sectors..).zip(before.chunks(512).zip(after.chunks(512)))
        {
            if written && sector == at.0 {
                assert_eq!(after, [0x99; 512]);
            } else if written {
                assert_eq!(after, before, "sector {sector}");
            }
        }
    }
});
