//! Writes what the fuzz targets start from, into `tmp/fuzz-seeds/TARGET` of the build directory:
//! small images from the golden ones and made to order, and rings and messages of a polite guest.

mod cache;
mod messages;
mod registry;
mod small_stack;
mod steps;

use std::fs;
use std::path::{Path, PathBuf};

use common::golden;
use common::layers::{self, LayerBuilder, Pack, noise, wrap_tar, zfile};
use ovbd_vhost::format::lsmt::Mapping;
use ovbd_vhost::format::tar;
use ovbd_vhost::format::zfile::Algorithm;
use ovbd_vhost::image::config::ImageConfig;
use ovbd_vhost::image::layer::Layer;
use ovbd_vhost::source::Blob;
use ovbd_vhost::units::Sector;

/// Larger golden files are left out: a fuzzer works on what it can change in one go.
const MOST: u64 = 12 << 10;

/// Longer seeds are cut (`-max_len` in `contrib/ci/fuzz`).
const MAX_LEN: usize = 16384;

/// A folder for the seeds of one target, empty.
fn folder(target: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .join("fuzz-seeds")
        .join(target);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).expect("folder");
    folder
}

/// Writes seeds that a fuzzer takes whole; returns how many.
fn write(folder: &Path, seeds: impl IntoIterator<Item = Vec<u8>>) -> usize {
    let seeds = seeds.into_iter().enumerate();
    seeds
        .map(|(number, seed)| {
            assert!((1..=MAX_LEN).contains(&seed.len()), "{} bytes", seed.len());
            fs::write(folder.join(number.to_string()), seed).expect("seed");
        })
        .count()
}

/// Small layers in every form.
fn forms() -> Vec<Vec<u8>> {
    let base = || LayerBuilder::new(1 << 20).without_padding();
    let plain = [
        base().lsmt(),
        base().data(3, &noise(1, 1024)).lsmt(),
        base()
            .data(0, &noise(2, 512))
            .zeroed(7, 40000)
            .data(1 << 42, &noise(3, 1536))
            .lsmt(),
    ];
    let mut all: Vec<_> = plain.to_vec();
    for plain in &plain {
        for algorithm in [Algorithm::Lz4, Algorithm::Zstd] {
            for (checksum, overwrite, block_size, dictionary_len) in [
                (true, true, 4096, 0),
                (false, true, 16384, 0),
                (true, false, 65536, 30),
                (false, false, 4096, 0),
            ] {
                let pack = Pack {
                    algorithm,
                    block_size,
                    checksum,
                    dictionary_len,
                    overwrite,
                };
                let packed = zfile(plain, pack);
                all.push(wrap_tar(&packed));
                all.push(packed);
            }
        }
        all.push(wrap_tar(plain));
    }
    all
}

fn golden_files() -> Vec<Vec<u8>> {
    let layers = golden::cases().into_iter().flat_map(|case| case.layers);
    let small = layers.filter(|path| fs::metadata(path).is_ok_and(|meta| meta.len() <= MOST));
    let mut files: Vec<_> = small
        .map(|path| fs::read(path).expect("golden layer"))
        .collect();
    files.sort_by_key(Vec::len);
    files.dedup();
    files
}

#[test]
fn layer() {
    let folder = folder("layer");
    let forms = forms();
    for (number, bytes) in forms.iter().enumerate() {
        let path = layers::write(&folder, &format!("made-{number}"), bytes);
        let blob = Blob::open(&path).expect("a file that was just written");
        Layer::load(blob.into()).expect("a sound layer");
    }
    assert!(
        write(&folder, golden_files()) > 20,
        "golden layers are small"
    );
}

#[test]
fn tar_heads() {
    let heads = golden::cases()
        .into_iter()
        .flat_map(|case| case.layers)
        .map(|path| fs::read(path).expect("golden layer"))
        .map(|bytes| bytes[..bytes.len().min(tar::PREFIX)].to_vec())
        .filter(|head| matches!(tar::payload(head), Ok(Some(_))))
        .chain([tar::prefix(0).to_vec(), tar::prefix(u64::MAX).to_vec()]);
    assert!(write(&folder("tar"), heads) > 4, "golden tar files");
}

#[test]
fn stack() {
    // Forms, sizes and mappings as `fuzz_targets/stack.rs` reads them.
    let layer = |form: u8, mappings: &[[u8; 4]]| {
        let head = [form * 32 + mappings.len() as u8, 64 + 12];
        [&head, mappings.as_flattened()].concat()
    };
    let below = [[0, 0, 15, 0], [9, 0, 3, 1], [0, 0x40, 200, 0], [4, 0, 0, 9]];
    let above = [[5, 0x40, 30, 0], [1, 0, 7, 3], [2, 0x80, 7, 3]];
    let seeds = (0..8).map(|form| {
        let layers = [layer(form, &below), layer(7 - form, &above), layer(2, &[])];
        [vec![2], layers.concat()].concat()
    });
    assert_eq!(write(&folder("stack"), seeds), 8);
}

#[test]
fn upper() {
    // Kind, size, data and journal as `fuzz_targets/upper.rs` reads them, then the log.
    let data = |start, length, at: u64| Mapping::data(Sector(start), length, Sector(8 + at));
    let zeroed = |start, length| Mapping::zeroed(Sector(start), length, Sector(8));
    let log = [
        data(0, 8, 0),
        data(100, 3, 8),
        zeroed(4, 2),
        data(101, 1, 11),
        zeroed(2000, 30),
        data(2010, 4, 12),
    ];
    let log = log.map(|mapping| mapping.expect("a mapping").encode());
    let seeds = (0..3).flat_map(|kind| {
        let whole = [&[kind, 12, 40, 0], log.as_flattened()].concat();
        let journalled = [&[kind, 12, 40, 1], &[7; 32][..], log.as_flattened()].concat();
        let torn = whole[..whole.len() - 5].to_vec();
        [whole, journalled, torn]
    });
    assert_eq!(write(&folder("upper"), seeds), 9);
}

#[test]
fn image_config() {
    let configs = [
        r#"{"repoBlobUrl":"https://registry/v2/a/blobs","lowers":[{"file":"/dev/null"},{"digest":"sha256:c3a4","size":4737695,"dir":"/dev"}],"upper":{"index":"","data":"","target":"","gzipIndex":""},"resultFile":"/run/result","download":{"enable":false},"accelerationLayer":false,"recordTracePath":""}"#,
        r#"{"lowers":[{"file":"a","targetFile":"b","targetDigest":"c","gzipIndex":"d"}]}"#,
        r#"{"lowers":[{"dir":"/dev/fd","file":""},{"file":null}],"upper":null}"#,
        r#"{"lowers":[],"accelerationLayer":true,"recordTracePath":"t"}"#,
        r#"{"upper":{"index":"i","data":"d","vsize":64}}"#,
    ];
    let folder = folder("image_config");
    assert_eq!(write(&folder, configs.map(Vec::from)), configs.len());
    for number in 0..configs.len() {
        let config = ImageConfig::load(&folder.join(number.to_string()));
        config.expect("a sound image config");
    }
}

/// Memory of a guest with a queue of eight in the places `fuzz_targets/virtqueue.rs` says, which
/// lies at guest address 0x10000: pairs of offset and bytes.
fn requests() -> Vec<(u16, Vec<u8>)> {
    const BASE: u64 = 0x10000;
    let descriptor = |at: u64, len: u32, flags: u16, next: u16| {
        let at = BASE + at;
        let rest = u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48;
        [at.to_le_bytes(), rest.to_le_bytes()].concat()
    };
    let (next, write, indirect) = (1, 2, 4);
    let table = [
        // A read in one piece, the serial, and a read whose data and status are in another table.
        descriptor(0x1000, 16, next, 1),
        descriptor(0x1ff0, 4096, next | write, 2),
        descriptor(0x1800, 1, write, 0),
        descriptor(0x1010, 16, next, 4),
        descriptor(0x1810, 21, write, 0),
        descriptor(0x1020, 16, next, 6),
        descriptor(0x1100, 48, indirect, 0),
        descriptor(0x1030, 17, next | write, 7),
    ];
    let inner = [
        descriptor(0x3000, 512, next | write, 2),
        descriptor(0x1801, 1, write, 0),
        descriptor(0x3200, 1536, next | write, 1),
    ];
    let header = |kind: u64, sector: u64| [kind.to_le_bytes(), sector.to_le_bytes()].concat();
    let available = [0u16, 4, 0, 3, 5, 7, 0, 0, 0, 0, 0];
    let available = available.map(u16::to_le_bytes).as_flattened().to_vec();
    vec![
        (0, available),
        (0x200, table.concat()),
        (
            0x1000,
            [header(0, 7), header(8, 0), header(0, 1021)].concat(),
        ),
        (0x1100, inner.concat()),
    ]
}

#[test]
fn virtqueue() {
    let mut memory = vec![0; 0x1130];
    for (at, bytes) in requests() {
        memory[usize::from(at)..][..bytes.len()].copy_from_slice(&bytes);
    }
    let area = || {
        let mut area = vec![0; 16 + 8 * 16];
        area[8..12].copy_from_slice(&[1, 0, 8, 0]);
        // Two of them are open, and the newer is the lower one.
        for (head, counter) in [(3, 9), (5, 4)] {
            area[16 + 16 * head] = 1;
            area[16 + 16 * head + 8] = counter;
        }
        area.resize(192, 0);
        area
    };
    let seeds = (0..16).map(|flags| {
        let head = [3, 0, 0, flags];
        let area = if flags & 4 != 0 { area() } else { vec![] };
        [&head[..], &memory, &area].concat()
    });
    assert_eq!(write(&folder("virtqueue"), seeds), 16);
}
