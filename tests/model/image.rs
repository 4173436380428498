//! Random stacks against a plain model: one array per disk, layers painted over each other.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::thread;

use common::checks::random_load;
use common::content::Random;
use common::daemon::Daemon;
use common::layers::{LayerBuilder, Pack, wrap_tar, write, zfile};
use common::load::{Load, Shape};
use common::memory::Memory;
use common::ring::{Addresses, Ring};
use common::session::{Session, Wanted, feature};
use ovbd_vhost::format::lsmt::PADDING;
use ovbd_vhost::format::zfile::Algorithm;
use ovbd_vhost::image::config::Stack;
use ovbd_vhost::image::pieces::Piece;
use ovbd_vhost::image::reader::Reader;
use ovbd_vhost::image::segment::Segment;
use ovbd_vhost::image::{Error, Image, MAX_LAYERS, MAX_STORED};
use ovbd_vhost::units::{Sector, SectorRange};
use proptest::prelude::*;

/// Sectors of each window of the disk that the random layers touch.
const WINDOW: u64 = 600;

/// Where the windows start: the first sectors, around 2 TiB, and the last sectors there can be.
const WINDOWS: [u64; 3] = [0, (1 << 32) - WINDOW / 2, (1 << 50) - WINDOW];

/// What the disk holds in the sectors that are not zero.
type Model = BTreeMap<u64, [u8; 512]>;

/// One mapping of a random layer.
#[derive(Clone, Debug)]
struct Extent {
    window: usize,
    /// Sectors between the end of the one before and this.
    gap: u64,
    length: u64,
    zeroed: bool,
    padding_after: bool,
    tag: u8,
}

#[derive(Clone, Debug)]
struct Plan {
    extents: Vec<Extent>,
    virtual_size: u64,
    packing: Option<Pack>,
    tar: bool,
    pad_index: bool,
}

fn extent() -> impl Strategy<Value = Extent> {
    let length = prop_oneof![1..10_u64, 1..80_u64];
    (
        0..3_usize,
        0..40_u64,
        length,
        prop::bool::weighted(0.3),
        any::<(bool, u8)>(),
    )
        .prop_map(
            |(window, gap, length, zeroed, (padding_after, tag))| Extent {
                window,
                gap,
                length,
                zeroed,
                padding_after,
                tag,
            },
        )
}

fn pack() -> impl Strategy<Value = Pack> {
    let algorithm = prop_oneof![Just(Algorithm::Lz4), Just(Algorithm::Zstd)];
    (
        algorithm,
        12..=16_u32,
        any::<(bool, bool)>(),
        prop_oneof![Just(0), 1..600_u32],
    )
        .prop_map(
            |(algorithm, shift, (checksum, overwrite), dictionary_len)| Pack {
                algorithm,
                block_size: 1 << shift,
                checksum,
                dictionary_len,
                overwrite,
            },
        )
}

fn plan() -> impl Strategy<Value = Plan> {
    let extents = prop::collection::vec(extent(), 0..25);
    // Ends inside one of the windows, at any byte; or says nothing.
    let size =
        (0..3_usize, 1..WINDOW * 512).prop_map(|(window, bytes)| (WINDOWS[window]) * 512 + bytes);
    let size = prop_oneof![1 => Just(0), 4 => size];
    (
        extents,
        size,
        prop::option::of(pack()),
        any::<(bool, bool)>(),
    )
        .prop_map(|(extents, virtual_size, packing, (tar, pad_index))| Plan {
            extents,
            virtual_size,
            packing,
            tar,
            pad_index,
        })
}

/// A sector that tells layer and place.
fn content(layer: usize, sector: u64) -> [u8; 512] {
    let mut bytes = [0x11; 512];
    for (at, word) in bytes.chunks_mut(8).enumerate().step_by(3) {
        word.copy_from_slice(&(sector << 20 | (layer as u64) << 8 | at as u64).to_le_bytes());
    }
    bytes
}

/// Writes the layer and paints it over the model.
fn build(dir: &Path, number: usize, plan: &Plan, model: &mut Model) -> PathBuf {
    let mut layer = LayerBuilder::new(plan.virtual_size).uuids(number as u128 + 1, number as u128);
    if !plan.pad_index {
        layer = layer.without_padding();
    }
    for (window, base) in WINDOWS.iter().enumerate() {
        let mut at = 0;
        for extent in plan.extents.iter().filter(|extent| extent.window == window) {
            let start = at + extent.gap;
            let end = (start + extent.length).min(WINDOW);
            if start >= end {
                break;
            }
            let sectors = base + start..base + end;
            if extent.zeroed {
                layer = layer.zeroed(sectors.start, end - start);
                sectors.for_each(|sector| {
                    model.remove(&sector);
                });
            } else {
                let data: Vec<u8> = sectors.clone().flat_map(|s| content(number, s)).collect();
                layer = layer.data(sectors.start, &data);
                model.extend(sectors.map(|sector| (sector, content(number, sector))));
            }
            layer = layer.tag(extent.tag);
            if extent.padding_after {
                layer = layer.entry(PADDING);
            }
            at = end;
        }
    }
    let mut bytes = layer.lsmt();
    if let Some(pack) = plan.packing {
        bytes = zfile(&bytes, pack);
    }
    if plan.tar {
        bytes = wrap_tar(&bytes);
    }
    write(dir, &format!("layer{number}"), &bytes)
}

/// What the disk of `size` bytes must read as.
fn expected(model: &Model, size: u64, start: u64, sectors: u64) -> Vec<u8> {
    let mut bytes = vec![0; (sectors * 512) as usize];
    for (sector, content) in model.range(start..start + sectors) {
        let at = ((sector - start) * 512) as usize;
        let len = size.saturating_sub(sector * 512).min(512) as usize;
        bytes[at..at + len].copy_from_slice(&content[..len]);
    }
    bytes
}

/// Reads `sectors` sectors and checks both them and the plan they were read by.
fn check(image: &Image, model: &Model, reader: &mut Reader, start: u64, sectors: u64) {
    if sectors == 0 {
        return;
    }
    let mut bytes = vec![0xEE; (sectors * 512) as usize];
    reader
        .read(image.at_own_size(), Sector(start), &mut bytes)
        .unwrap();
    let expected = expected(model, image.size(), start, sectors);
    let wrong = bytes
        .chunks(512)
        .zip(expected.chunks(512))
        .position(|(a, b)| a != b);
    assert_eq!(wrong, None, "of {sectors} sectors at {start}");

    let mut len = 0;
    let range = SectorRange::new(Sector(start), Sector(start + sectors));
    for piece in image.at_own_size().pieces(range) {
        assert!(piece.len() > 0);
        if let Piece::Compressed(run) = piece {
            assert!(run.stored as usize <= MAX_STORED && run.count > 0);
        }
        len += piece.len();
    }
    assert_eq!(len, sectors * 512);
}

fn open(paths: &[PathBuf]) -> Result<Image, Error> {
    Image::open(&Stack::new(paths))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..Default::default() })]

    #[test]
    fn stacks_read_as_the_model(
        plans in prop::collection::vec(plan(), 1..7),
        reads in prop::collection::vec((0..3_usize, 0..WINDOW, 1..200_u64), 40),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut model = Model::new();
        let paths: Vec<_> = plans
            .iter()
            .enumerate()
            .map(|(number, plan)| build(dir.path(), number, plan, &mut model))
            .collect();
        let size = plans.iter().rev().map(|plan| plan.virtual_size).find(|size| *size > 0);
        let Some(size) = size else {
            prop_assert!(matches!(open(&paths), Err(Error::NoSize)));
            return Ok(());
        };
        let image = open(&paths).unwrap();
        prop_assert_eq!(image.size(), size);
        prop_assert_eq!(open(&paths).unwrap().serial(paths.len()), image.serial(paths.len()));
        let sectors = image.at_own_size().sectors().0;
        prop_assert_eq!(sectors, size.div_ceil(512));
        let mut reader = Reader::new();
        for base in WINDOWS {
            let len = WINDOW.min(sectors.saturating_sub(base));
            check(&image, &model, &mut reader, base, len);
        }
        for (window, at, len) in reads {
            let start = WINDOWS[window] + at;
            check(&image, &model, &mut reader, start, len.min(sectors.saturating_sub(start)));
        }
        let mut beyond = [0; 1024];
        let error = reader.read(image.at_own_size(), Sector(sectors - 1), &mut beyond).unwrap_err();
        prop_assert!(matches!(error, Error::Beyond { .. }), "{:?}", error);
    }
}

/// Sixteen reads of a page in flight in each of three queues.
const SHAPE: Shape = Shape {
    depth: 16,
    len: 4096,
    segments: 2,
    indirect: true,
};

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..Default::default() })]

    #[test]
    fn stacks_read_as_the_model_by_several_queues_at_depth(
        plans in prop::collection::vec(plan(), 1..7),
        seed in any::<u64>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut model = Model::new();
        let paths: Vec<_> = plans
            .iter()
            .enumerate()
            .map(|(number, plan)| build(dir.path(), number, plan, &mut model))
            .collect();
        let size = plans.iter().rev().map(|plan| plan.virtual_size).find(|size| *size > 0);
        let size = size.unwrap_or(0);
        prop_assume!(size >= u64::from(SHAPE.len));
        let content = expected(&model, size, 0, WINDOW.min(size.div_ceil(512)));

        let daemon = Daemon::serve(&paths);
        let mut session = Session::negotiate(daemon.connect(), Wanted::all()).unwrap();
        let memory = Memory::typical();
        session.share(&memory).unwrap();
        let loads: Vec<_> = (0..3)
            .map(|index| {
                let at = Addresses::alloc(&memory, 64, [index; 3]);
                let ring = Ring::new(&memory, at, 64, session.has(feature::EVENT_IDX));
                let load = Load::new(ring, &memory, index, SHAPE);
                session.start_queue(index, &load.ring.vring, 0).unwrap();
                load
            })
            .collect();
        thread::scope(|scope| {
            for (mut load, number) in loads.into_iter().zip(0..) {
                let content = &content;
                scope.spawn(move || {
                    let mut random = Random::new(seed.wrapping_add(number));
                    random_load(&mut load, SHAPE, content, 400, &mut random);
                });
            }
        });
    }
}

#[test]
fn more_than_a_thousand_layers() {
    const LAYERS: u64 = 1100;
    let dir = tempfile::tempdir().unwrap();
    let mut model = Model::new();
    let mut paths = Vec::new();
    for number in 0..LAYERS {
        // Each layer writes over its neighbours' sectors, and clears one in front of a third.
        let start = number * 37 % 5000;
        let sectors = start..start + 6;
        let data: Vec<u8> = sectors
            .clone()
            .flat_map(|s| content(number as usize, s))
            .collect();
        let layer = LayerBuilder::new(5010 * 512)
            .data(start, &data)
            .zeroed(start + 7, 2);
        model.extend(sectors.map(|sector| (sector, content(number as usize, sector))));
        model.remove(&(start + 7));
        model.remove(&(start + 8));
        paths.push(write(dir.path(), &format!("{number}"), &layer.lsmt()));
    }
    let image = open(&paths).unwrap();
    assert_eq!(image.layers().len(), LAYERS as usize);
    let mut reader = Reader::new();
    for start in (0..5010).step_by(501) {
        check(&image, &model, &mut reader, start, 501);
    }
}

#[test]
fn the_most_layers_there_can_be() {
    let dir = tempfile::tempdir().unwrap();
    let below = LayerBuilder::new(1 << 20).data(0, &[content(1, 0), content(1, 1)].concat());
    let top = LayerBuilder::new(1 << 20).data(1, &content(2, 1));
    let below = write(dir.path(), "below", &below.lsmt());
    let top = write(dir.path(), "top", &top.lsmt());
    let mut paths = vec![below; MAX_LAYERS - 1];
    paths.push(top);
    let image = open(&paths).unwrap();
    let model = Model::from([(0, content(1, 0)), (1, content(2, 1))]);
    check(&image, &model, &mut Reader::new(), 0, 10);
    let layers: Vec<_> = image.index().iter().map(Segment::content).collect();
    assert_eq!(layers.len(), 2);
    paths.push(dir.path().join("below"));
    assert!(matches!(open(&paths), Err(Error::TooManyLayers(4095))));
}
