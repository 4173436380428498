//! Stacks of layers with any index, in any form: merge, look-up, plan and read agree with a search
//! through the layers from the top.
//!
//! An input is a byte with the number of layers, then for each layer a byte with its form and its
//! number of mappings, a byte with its size, and four bytes for each mapping.
#![no_main]

use common::layers::{LayerBuilder, Pack, wrap_tar, zfile};
use libfuzzer_sys::fuzz_target;
use ovbd_vhost::format::zfile::Algorithm;
use ovbd_vhost::image::Image;
use ovbd_vhost::image::config::Stack;
use ovbd_vhost::image::reader::Reader;
use ovbd_vhost::units::{Sector, SectorRange, Sectors};

#[path = "../file.rs"]
mod file;

/// Sectors of data in each layer.
const DATA: u64 = 16;
/// No sector beyond this can be told.
const END: u64 = 1 << 50;

/// One mapping: sectors of the disk, and the sector of the layer's data that stands there.
struct Mapping {
    start: u64,
    end: u64,
    data: Option<u64>,
}

fn content(layer: usize, sector: u64) -> [u8; 512] {
    let tag = [0xA0 | layer as u8, sector as u8, 0x5A, 1];
    std::array::from_fn(|at| tag[at % 4])
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (now, later) = bytes.split_first_chunk()?;
    *bytes = later;
    Some(*now)
}

/// The next layer of the input: its file's bytes, its size and its mappings.
fn layer(bytes: &mut &[u8], number: usize) -> Option<(Vec<u8>, u64, Vec<Mapping>)> {
    let [form, size] = take(bytes)?;
    let size = match size {
        0..64 => 0,
        _ => 512 << (size % 50),
    };
    let mut mappings = Vec::new();
    let mut at = 0;
    for _ in 0..form % 32 {
        let Some([gap, kind, length, data]) = take(bytes) else {
            break;
        };
        let far = if kind & 0x80 != 0 { 30 } else { 0 };
        let start = at + (u64::from(gap) << far);
        let zeroed = kind & 0x40 != 0;
        let most = if zeroed { 16383 } else { DATA };
        let scale = if kind & 0x20 != 0 { 64 } else { 1 };
        let length = 1 + u64::from(length) * scale % most;
        if start + length > END {
            break;
        }
        at = start + length;
        let data = (!zeroed).then(|| u64::from(data) % (DATA - length + 1));
        mappings.push(Mapping {
            start,
            end: at,
            data,
        });
    }
    let mut builder = LayerBuilder::new(size);
    let data: Vec<u8> = (0..DATA).flat_map(|at| content(number, at)).collect();
    builder = builder.raw_data(&data);
    for mapping in &mappings {
        builder = builder.mapping(mapping.start, mapping.end - mapping.start, mapping.data);
    }
    let plain = builder.lsmt();
    let pack = |algorithm| Pack {
        algorithm,
        checksum: number.is_multiple_of(2),
        block_size: 4096 << (number % 3),
        ..Pack::default()
    };
    let file = match form / 32 % 4 {
        0 => zfile(&plain, pack(Algorithm::Lz4)),
        1 => zfile(&plain, pack(Algorithm::Zstd)),
        _ => plain,
    };
    let file = if form & 0x80 != 0 {
        wrap_tar(&file)
    } else {
        file
    };
    Some((file, size, mappings))
}

fuzz_target!(|bytes: &[u8]| {
    let mut rest = bytes;
    let Some([count]) = take(&mut rest) else {
        return;
    };
    let layers: Vec<_> = (0..1 + usize::from(count) % 6)
        .map_while(|number| layer(&mut rest, number))
        .collect();
    let files: Vec<_> = layers
        .iter()
        .map(|layer| file::Held::new(&layer.0))
        .collect();
    let size = layers
        .iter()
        .rev()
        .map(|layer| layer.1)
        .find(|size| *size > 0);
    let image = Image::open(&Stack::new(files.iter().map(file::Held::path)));
    let Some(size) = size else {
        assert!(image.is_err(), "a disk without a size");
        return;
    };
    let image = image.expect("layers in order");
    assert_eq!(image.size(), size);

    let expected = |sector: u64| {
        let found = layers.iter().enumerate().rev().find_map(|(number, layer)| {
            let mapping = layer
                .2
                .iter()
                .find(|mapping| (mapping.start..mapping.end).contains(&sector))?;
            Some((
                number,
                mapping.data.map(|data| data + sector - mapping.start),
            ))
        });
        match found {
            Some((layer, Some(data))) => content(layer, data),
            _ => [0; 512],
        }
    };
    let mut last = Sector(0);
    for segment in image.index().iter() {
        assert!(segment.start() >= last && !segment.range().is_empty());
        assert_eq!(image.index().find(segment.start()), Some(segment));
        assert_eq!(
            image.index().find(segment.end() - Sectors(1)),
            Some(segment)
        );
        last = segment.end();
    }
    let mut reader = Reader::new();
    let sectors = image.at_own_size().sectors().0;
    let edges = layers.iter().flat_map(|layer| &layer.2);
    for edge in edges.flat_map(|mapping| [mapping.start, mapping.end]) {
        let start = edge.saturating_sub(2).min(sectors);
        let count = (sectors - start).min(5);
        let planned: usize = image
            .at_own_size()
            .pieces(SectorRange::new(Sector(start), Sector(start + count)))
            .map(|piece| piece.len() as usize)
            .sum();
        assert_eq!(planned, count as usize * 512);
        let mut found = vec![0xEE; planned];
        reader
            .read(image.at_own_size(), Sector(start), &mut found)
            .expect("whole layers");
        for (sector, found) in (start..).zip(found.chunks(512)) {
            assert_eq!(found, expected(sector), "sector {sector}");
        }
    }
});
