//! Reads what upstream's tools wrote, and what is damaged.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::content::Random;
use common::golden;
use common::layers::{LayerBuilder, Pack, noise, wrap_tar, write, zfile};
use ovbd_vhost::format::zfile::Algorithm;
use ovbd_vhost::image::config::Stack;
use ovbd_vhost::image::reader::Reader;
use ovbd_vhost::image::{Error, Image};
use ovbd_vhost::io::scatter::Scatter;
use ovbd_vhost::source::LayerRef;
use ovbd_vhost::units::Sector;
use sha2::{Digest, Sha256};
use vm_memory::VolatileSlice;

fn open(layers: &[impl AsRef<Path>]) -> Result<Image, Error> {
    Image::open(&Stack::new(layers.iter().map(AsRef::as_ref)))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The whole disk, up to its size in bytes, read in large pieces.
fn whole(image: &Image) -> Result<Vec<u8>, Error> {
    let mut disk = vec![0xEE; (image.at_own_size().sectors().0 * 512) as usize];
    let mut reader = Reader::new();
    for (number, chunk) in disk.chunks_mut(1 << 20).enumerate() {
        reader.read(image.at_own_size(), Sector(number as u64 * 2048), chunk)?;
    }
    let tail = disk.split_off(image.size() as usize);
    assert!(
        tail.iter().all(|byte| *byte == 0),
        "nothing beyond the size"
    );
    Ok(disk)
}

/// Reads at random places, into random pieces of memory.
fn random_reads(image: &Image, disk: &[u8], seed: u64, count: usize) {
    let mut random = Random::new(seed);
    let mut reader = Reader::new();
    let mut padded = disk.to_vec();
    padded.resize((image.at_own_size().sectors().0 * 512) as usize, 0);
    for _ in 0..count {
        let start = random.below(image.at_own_size().sectors().0);
        let len = 1 + random.below(256.min(image.at_own_size().sectors().0 - start));
        let mut buffer = vec![0xEE; len as usize * 512];
        let mut scatter = Scatter::new();
        let mut rest = &mut buffer[..];
        while !rest.is_empty() {
            let cut = 1 + random.below(20_000.min(rest.len() as u64));
            let (piece, after) = rest.split_at_mut(cut as usize);
            scatter.push(VolatileSlice::from(piece));
            rest = after;
        }
        reader
            .read_scatter(image.at_own_size(), Sector(start), &scatter)
            .unwrap();
        drop(scatter);
        let at = start as usize * 512;
        assert!(
            buffer == padded[at..at + buffer.len()],
            "{len} sectors at {start}"
        );
    }
}

#[test]
fn every_golden_image_reads_as_written() {
    let mut seen = 0;
    for case in golden::cases() {
        if case.has_upper || case.name.starts_with("14") {
            continue;
        }
        let image = open(&case.layers).unwrap_or_else(|error| panic!("{}: {error:?}", case.name));
        assert_eq!(image.size(), case.size, "{}", case.name);
        let disk = whole(&image).unwrap();
        assert_eq!(hex(&Sha256::digest(&disk)), case.sha256, "{}", case.name);
        random_reads(&image, &disk, case.size, 300);
        seen += 1;
    }
    assert_eq!(seen, 21);
}

#[test]
fn the_base_layer_of_upstream_opens() {
    let path = golden::path("base-ext4_64/ext4_64");
    let image = open(&[&path]).unwrap();
    assert_eq!(image.size(), 64 << 30);
    let layer = &image.layers()[0];
    assert_eq!(layer.mappings(), 8323);
    assert!(!layer.container().zfile_map().unwrap().header().digest);
    let mut reader = Reader::new();
    let mut superblock = [0; 1024];
    reader
        .read(image.at_own_size(), Sector(2), &mut superblock)
        .unwrap();
    assert_eq!(superblock[56..58], [0x53, 0xEF], "magic of ext4");
    for segment in image.index().iter() {
        let mut bytes = vec![0; segment.length().bytes() as usize];
        reader
            .read(image.at_own_size(), segment.start(), &mut bytes)
            .unwrap();
    }
}

#[test]
fn all_forms_of_a_committed_layer_hold_the_same() {
    let open = |name| open(&[golden::path(&format!("commit-pairs/{name}"))]).unwrap();
    let raw = open("raw.obd");
    let disk = whole(&raw).unwrap();
    for name in ["lz4.obd", "zstd.obd", "lz4.tar"] {
        assert!(whole(&open(name)).unwrap() == disk, "{name}");
    }
    assert_eq!(open("lz4.obd").serial(1), open("lz4.tar").serial(1));
    assert_eq!(raw.serial(1).len(), 20);
    let trailer = raw.layers()[0].trailer();
    assert_eq!(trailer.message, b"golden pair");
    assert_eq!(
        trailer.uuid.to_string(),
        "11111111-2222-3333-4444-555555555555"
    );
}

#[test]
fn our_headers_are_those_of_upstream() {
    use ovbd_vhost::format::{lsmt, tar, zfile};
    let raw = std::fs::read(golden::path("commit-pairs/raw.obd")).unwrap();
    for (part, at) in [
        (lsmt::HeaderKind::Header, 0),
        (lsmt::HeaderKind::Trailer, raw.len() - 4096),
    ] {
        let bytes = raw[at..].first_chunk().unwrap();
        assert!(
            lsmt::Header::decode(bytes, part).unwrap().encode(part) == *bytes,
            "{part}"
        );
    }
    let packed = std::fs::read(golden::path("commit-pairs/lz4.obd")).unwrap();
    let header =
        zfile::Header::decode(packed.first_chunk().unwrap(), zfile::HeaderKind::Header).unwrap();
    assert!(header.is_overwritten() && header.digest);
    assert!(packed[..512] == zfile::final_header(&header.format, &header.totals));
    assert!(packed[packed.len() - 512..] == zfile::trailer(&header.format, &header.totals));
    let wrapped = std::fs::read(golden::path("commit-pairs/lz4.tar")).unwrap();
    assert!(wrapped[..1536] == tar::prefix(packed.len() as u64));
    assert!(wrapped == wrap_tar(&packed));
}

/// Reads a damaged image sector by sector: every one that reads must be as it was. How many did
/// not read.
fn failed_sectors(image: &Image, undamaged: &[u8]) -> usize {
    let mut reader = Reader::new();
    let mut sector = [0; 512];
    let results = undamaged.chunks(512).enumerate().map(|(number, expected)| {
        match reader.read(image.at_own_size(), Sector(number as u64), &mut sector) {
            Ok(()) => {
                assert!(
                    sector[..expected.len()] == *expected,
                    "wrong data in sector {number}"
                );
                0
            }
            Err(_) => 1,
        }
    });
    results.sum()
}

#[test]
fn damaged_golden_images_never_read_wrong() {
    let good = whole(&open(&golden::find("01-lz4-4k-nocrc").layers).unwrap()).unwrap();
    let damaged = golden::find("14a-flip-block-crc");
    let image = open(&damaged.layers).unwrap();
    let failed = failed_sectors(&image, &good);
    assert!(
        (1..=16).contains(&failed),
        "one block of 4 KiB, {failed} sectors failed"
    );
    let error = whole(&image).unwrap_err();
    let text = format!("{error}: {}", std::error::Error::source(&error).unwrap());
    assert!(
        text.contains("damaged block") && text.contains("checksum"),
        "{text}"
    );

    for (name, expected) in [
        ("14d-flip-header-digest", "digest"),
        ("14g-truncated", "trailer"),
        ("14j-raw-index-moffset-oob", "data area"),
    ] {
        let error = open(&golden::find(name).layers).unwrap_err();
        let text = format!("{error}: {}", std::error::Error::source(&error).unwrap());
        assert!(text.contains(expected) && text.contains(name), "{text}");
    }
    // No checksum covers this block, and it decodes: the flipped byte of data is all that differs.
    let flipped = whole(&open(&golden::find("14b-flip-block-nocrc").layers).unwrap()).unwrap();
    let differing = flipped
        .iter()
        .zip(&good)
        .filter(|(one, other)| one != other);
    assert_eq!((flipped.len(), differing.count()), (good.len(), 1));
}

/// A small layer with data, zeros and holes, and what it reads as.
fn small_layer() -> (LayerBuilder, Vec<u8>) {
    let mut disk = vec![0; 64 * 512 - 100];
    let (first, second) = (noise(1, 5 * 512), noise(2, 9 * 512));
    disk[512..6 * 512].copy_from_slice(&first);
    disk[30 * 512..39 * 512].copy_from_slice(&second);
    let layer = LayerBuilder::new(disk.len() as u64)
        .data(1, &first)
        .zeroed(10, 10)
        .data(30, &second)
        .without_padding();
    (layer, disk)
}

/// Opens the file as a layer and reads it all: nothing may panic, nothing may be wrong. Whether it
/// all read.
fn survives(path: &Path, disk: &[u8]) -> bool {
    let Ok(image) = open(&[path]) else {
        return false;
    };
    // A size is no content: only a smaller or larger disk may differ, and that the rules must see.
    assert_eq!(image.size(), disk.len() as u64);
    failed_sectors(&image, disk) == 0
}

#[test]
fn every_flipped_byte_of_a_checksummed_layer_is_noticed_or_harmless() {
    let dir = tempfile::tempdir().unwrap();
    let (layer, disk) = small_layer();
    for algorithm in [Algorithm::Lz4, Algorithm::Zstd] {
        for overwrite in [true, false] {
            let pack = Pack {
                algorithm,
                overwrite,
                ..Pack::default()
            };
            let good = zfile(&layer.lsmt(), pack);
            let path = write(dir.path(), "flipped", &good);
            let file = File::options().write(true).open(&path).unwrap();
            assert!(survives(&path, &disk));
            let mut unnoticed = 0;
            for (at, byte) in good.iter().enumerate() {
                for flip in [1 << (at % 8), 0xFF] {
                    file.write_all_at(&[byte ^ flip], at as u64).unwrap();
                    unnoticed += usize::from(survives(&path, &disk));
                }
                file.write_all_at(&[*byte], at as u64).unwrap();
            }
            // Only the unused ends of header and trailer are free.
            assert_eq!(unnoticed, 2 * 2 * (512 - 89));
        }
    }
}

#[test]
fn every_truncation_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let (layer, disk) = small_layer();
    let lsmt = layer.lsmt();
    let packed = zfile(&lsmt, Pack::default());
    // Tar's own zeros at the end may be missing, as they hold nothing.
    for (bytes, needed) in [
        (&packed, packed.len()),
        (&wrap_tar(&packed), 1536 + packed.len()),
        (&wrap_tar(&lsmt), 1536 + lsmt.len()),
        (&lsmt, lsmt.len()),
    ] {
        let path = write(dir.path(), "truncated", bytes);
        let file = File::options().write(true).open(&path).unwrap();
        for len in (0..bytes.len()).rev() {
            file.set_len(len as u64).unwrap();
            let fine = survives(&path, &disk);
            assert_eq!(fine, len >= needed, "{len} of {} bytes", bytes.len());
        }
    }
}

/// Without checksums wrong data cannot be told from right; but structure can.
#[test]
fn a_flip_in_a_bare_layer_is_refused_or_reads_without_an_error() {
    /// Both magics begin the header, and nothing is after its last field.
    const MAGICS: Range<usize> = 0..24;
    const UNUSED: Range<usize> = 392..512;
    let dir = tempfile::tempdir().unwrap();
    let (layer, disk) = small_layer();
    let good = layer.lsmt();
    let index = good.len() - 4096 - 512;
    for at in (0..512).chain(index..good.len() - 3600) {
        for bit in 0..8 {
            let mut bad = good.clone();
            bad[at] ^= 1 << bit;
            let path = write(dir.path(), "damaged", &bad);
            let opened = open(&[path]);
            assert!(opened.is_err() || !MAGICS.contains(&at), "{at}, {bit}");
            if UNUSED.contains(&at) {
                assert!(whole(opened.as_ref().unwrap()).unwrap() == disk);
            }
            let Ok(image) = opened else { continue };
            let mut reader = Reader::new();
            let mut sector = [0; 512];
            for number in [0, 1, 30, image.at_own_size().sectors().0 - 1] {
                let number = number.min(image.at_own_size().sectors().0 - 1);
                reader
                    .read(image.at_own_size(), Sector(number), &mut sector)
                    .unwrap();
            }
        }
    }
}

#[test]
fn wrappers_in_every_combination() {
    let dir = tempfile::tempdir().unwrap();
    let (layer, disk) = small_layer();
    let lsmt = layer.lsmt();
    let mut forms = vec![("bare".to_owned(), lsmt.clone())];
    for algorithm in [Algorithm::Lz4, Algorithm::Zstd] {
        for block_size in [4096, 8192, 16384, 32768, 65536] {
            for (checksum, dictionary_len, overwrite) in [
                (true, 0, true),
                (false, 0, false),
                (true, 777, false),
                (false, 4096, true),
            ] {
                let pack = Pack {
                    algorithm,
                    block_size,
                    checksum,
                    dictionary_len,
                    overwrite,
                };
                forms.push((format!("{pack:?}"), zfile(&lsmt, pack)));
            }
        }
    }
    for (name, bytes) in forms {
        for bytes in [wrap_tar(&bytes), bytes] {
            let path = write(dir.path(), "layer", &bytes);
            let image = open(&[&path]).unwrap_or_else(|error| panic!("{name}: {error:?}"));
            assert!(whole(&image).unwrap() == disk, "{name}");
            random_reads(&image, &disk, 7, 50);
        }
    }
}

#[test]
fn incompressible_blocks_of_every_size() {
    let dir = tempfile::tempdir().unwrap();
    let mut random = Random::new(3);
    let data: Vec<u8> = (0..512 * 1024).map(|_| random.below(256) as u8).collect();
    let lsmt = LayerBuilder::new(data.len() as u64).data(0, &data).lsmt();
    for algorithm in [Algorithm::Lz4, Algorithm::Zstd] {
        for block_size in [4096, 8192, 16384, 32768, 65536] {
            let pack = Pack {
                algorithm,
                block_size,
                ..Pack::default()
            };
            let packed = zfile(&lsmt, pack);
            assert!(packed.len() > data.len());
            let path = write(dir.path(), "layer", &packed);
            let image = open(&[path]).unwrap();
            assert!(whole(&image).unwrap() == data, "{algorithm} {block_size}");
        }
    }
}

#[test]
fn what_is_no_layer_is_refused_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let lsmt = small_layer().0.lsmt();
    let mut unsealed = lsmt.clone();
    let trailer = lsmt.len() - 4096;
    unsealed[trailer + 28] = 2;
    let mut index_file = lsmt.clone();
    index_file[28] = 1;
    for (name, bytes, expected) in [
        ("empty", Vec::new(), "at least 8192"),
        ("text", b"hello".to_vec(), "at least 8192"),
        ("zeros", vec![0; 100_000], "no LSMT magic in the header"),
        ("unsealed", unsealed, "sealed"),
        ("index", index_file, "index of a writable layer"),
        ("tar of nothing", wrap_tar(&[]), "at least 8192"),
        ("short tar", wrap_tar(&lsmt)[..3000].to_vec(), "truncated"),
        (
            "header only",
            zfile(&lsmt, Pack::default())[..512].to_vec(),
            "trailer",
        ),
    ] {
        let path = write(dir.path(), name, &bytes);
        let error = open(&[path]).unwrap_err();
        let mut text = error.to_string();
        if let Some(source) = std::error::Error::source(&error) {
            text = format!("{text}: {source}");
        }
        assert!(text.contains(expected) && text.contains(name), "{text}");
        assert!(!text.contains('\n'), "{text}");
    }
    let none: [&Path; 0] = [];
    assert!(matches!(open(&none), Err(Error::NoLayers)));
    let many = vec!["x"; 5000];
    assert!(matches!(open(&many), Err(Error::TooManyLayers(5000))));
    let sizeless = LayerBuilder::new(0).data(0, &[1; 512]).lsmt();
    let path = write(dir.path(), "sizeless", &sizeless);
    assert!(matches!(open(&[path]), Err(Error::NoSize)));
}

#[test]
fn a_stack_is_loaded_from_open_files_alone() {
    let dir = tempfile::tempdir().unwrap();
    let case = golden::find("08-deep64-small");
    let copies = case.layers.iter().enumerate().map(|(number, layer)| {
        let copy = dir.path().join(number.to_string());
        std::fs::copy(layer, &copy).unwrap();
        copy
    });
    let stack = Stack::new(copies.collect::<Vec<_>>());
    let open = stack.open_files().unwrap();
    // Whatever has the names now is not looked at.
    for layer in stack.layers().iter().filter_map(LayerRef::file) {
        std::fs::remove_file(layer).unwrap();
        std::fs::write(layer, "another file").unwrap();
    }
    let image = Image::load(open).unwrap();
    let disk = whole(&image).unwrap();
    assert_eq!(hex(&Sha256::digest(&disk)), case.sha256);
}

/// What lies behind a layer on a block device, whose length is a multiple of a larger unit.
#[test]
fn layers_on_something_longer_open() {
    let dir = tempfile::tempdir().unwrap();
    let (layer, disk) = small_layer();
    let bare = layer.lsmt();
    let mut forms = vec![(false, bare.clone())];
    for algorithm in [Algorithm::Lz4, Algorithm::Zstd] {
        for overwrite in [true, false] {
            let pack = Pack {
                algorithm,
                overwrite,
                ..Pack::default()
            };
            forms.push((overwrite, zfile(&bare, pack)));
        }
    }
    let opened = |bytes: &[u8], behind: &[u8]| {
        let path = write(dir.path(), "layer", &[bytes, behind].concat());
        let image = open(&[path]).ok()?;
        assert!(whole(&image).unwrap() == disk);
        Some(image)
    };
    let (zeros, old) = (vec![0; (4 << 20) + 512], noise(5, (1 << 20) + 77));
    for (knows_its_end, bytes) in &forms {
        assert!(opened(bytes, &zeros).is_some());
        assert!(opened(&wrap_tar(bytes), &zeros).is_some());
        assert!(opened(&wrap_tar(bytes), &old).is_some());
        assert_eq!(opened(bytes, &old).is_some(), *knows_its_end);
    }
    // A layer that was cut short is not found to end in zeros, or in a layer that is its data.
    let trailer = bare.len() - 4096;
    for len in (4096..=trailer).step_by(512) {
        assert!(opened(&bare[..len], &zeros).is_none(), "{len}");
    }
    let nested = LayerBuilder::new(64 << 20).data(0, &bare).lsmt();
    assert!(opened(&nested[..4096 + bare.len()], &zeros).is_none());
}
