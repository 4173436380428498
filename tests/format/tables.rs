//! Image tables: the same image as from its layers, without reading them; and damaged ones, which give
//! I/O errors or bytes of the layers, never a panic.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use common::content::Random;
use common::golden;
use common::layers::{LayerBuilder, Pack, noise, wrap_tar, write, zfile};
use ovbd_vhost::format::digest::Digest;
use ovbd_vhost::format::tables::{self, HEADER_LEN, Header};
use ovbd_vhost::format::zfile::Algorithm;
use ovbd_vhost::image::config::Stack;
use ovbd_vhost::image::reader::Reader;
use ovbd_vhost::image::tables::{TablesFile, TablesWriter, WriteError};
use ovbd_vhost::image::{Error, Image, OpenStack};
use ovbd_vhost::source::{Blob, LayerRef, Presence, RemoteBlob, Ticket, Waker};
use ovbd_vhost::units::Sector;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

fn open_stack(layers: &[PathBuf]) -> OpenStack {
    Stack::new(layers).open_files().unwrap()
}

fn key(stack: &OpenStack) -> Digest {
    tables::key(&stack.identities().unwrap().unwrap())
}

/// The tables of an image, in a file of their own.
fn tables_of(image: &Image, key: Digest) -> File {
    let file = tempfile::tempfile().unwrap();
    let writer = TablesWriter::new(file.try_clone().unwrap(), key);
    let len = writer.write(image).unwrap();
    assert_eq!(len, file.metadata().unwrap().len());
    file
}

/// A copy of a file, with changes.
fn changed(file: &File, change: impl FnOnce(&mut Vec<u8>)) -> File {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    change(&mut bytes);
    let copy = tempfile::tempfile().unwrap();
    copy.write_all_at(&bytes, 0).unwrap();
    copy
}

fn with_tables(stack: OpenStack, file: File) -> OpenStack {
    stack.with_tables(Some(Arc::new(TablesFile::new(file))))
}

/// The whole disk, in pieces of 64 sectors; `None` for those that cannot be read.
fn pieces(image: &Image) -> Vec<Option<Vec<u8>>> {
    let disk = image.sized(image.size().min(4 << 20));
    let mut reader = Reader::new();
    let starts = (0..disk.sectors().0).step_by(64);
    let read = starts.map(|start| {
        let len = (disk.sectors().0 - start).min(64) * 512;
        let mut bytes = vec![0xEE; len as usize];
        reader.read(disk, Sector(start), &mut bytes).ok()?;
        Some(bytes)
    });
    read.collect()
}

/// A layer of each form, one above the other.
fn forms(dir: &Path) -> Vec<PathBuf> {
    let base = |seed| {
        let data = (0..40_u64).fold(LayerBuilder::new(2 << 20), |layer, number| {
            layer.data(seed + number * 97, &noise(seed * 100 + number, 8 * 512))
        });
        data.zeroed(4000, 50).lsmt()
    };
    let pack = |algorithm, checksum, block_size| Pack {
        algorithm,
        checksum,
        block_size,
        ..Pack::default()
    };
    let layers = [
        base(1),
        zfile(&base(2), pack(Algorithm::Lz4, true, 4096)),
        wrap_tar(&zfile(&base(3), pack(Algorithm::Zstd, true, 16384))),
        wrap_tar(&base(5)),
        zfile(&base(4), pack(Algorithm::Lz4, false, 65536)),
    ];
    let paths = layers.iter().enumerate();
    let paths = paths.map(|(number, bytes)| write(dir, &number.to_string(), bytes));
    paths.collect()
}

#[test]
fn every_golden_image_is_the_same_from_its_tables() {
    let mut seen = 0;
    for case in golden::cases() {
        if case.has_upper || case.name.starts_with("14") {
            continue;
        }
        let stack = open_stack(&case.layers);
        let key = key(&stack);
        let read = Image::load_in_any_order(stack.clone()).unwrap();
        let file = tables_of(&read, key);
        let mapped = Image::load_in_any_order(with_tables(stack, file)).unwrap();
        assert_eq!(mapped.size(), read.size(), "{}", case.name);
        assert_eq!(mapped.block_size(), read.block_size(), "{}", case.name);
        assert_eq!(mapped.serial(usize::MAX), read.serial(usize::MAX));
        assert_eq!(mapped.stack_id().unwrap(), read.stack_id().unwrap());
        assert!(mapped.index().iter().eq(read.index().iter()));
        for (mapped, read) in mapped.layers().iter().zip(read.layers()) {
            assert_eq!(mapped.trailer(), read.trailer());
            assert_eq!(mapped.mappings(), read.mappings());
        }
        assert!(pieces(&mapped) == pieces(&read), "{}", case.name);
        seen += 1;
    }
    assert_eq!(seen, 21);
}

/// A blob of which nothing is local and nothing may be wanted.
#[derive(Debug)]
struct Nothing;

impl Presence for Nothing {
    fn is_present(&self, _: u64, _: u64) -> bool {
        false
    }

    fn request(&self, _: u64, _: u64, _: &Arc<Waker>, _: Ticket) {
        panic!("a layer is read");
    }

    fn fetch_ahead(&self, _: u64, _: u64) {
        panic!("a layer is read ahead");
    }

    fn local_bytes(&self) -> u64 {
        0
    }

    fn replay(&self, _: u64, _: u64) {}

    fn reject(&self, _: u64, _: u64) -> bool {
        false
    }

    fn patience(&self) -> Duration {
        Duration::ZERO
    }
}

#[test]
fn layers_of_a_registry_are_not_read_and_need_not_be_there() {
    let dir = tempfile::tempdir().unwrap();
    let paths = forms(dir.path());
    let remotes = |absent: bool| {
        let blobs = paths.iter().map(|path| {
            let bytes = std::fs::read(path).unwrap();
            let remote = RemoteBlob {
                digest: Digest::of(&bytes),
                size: None,
                blobs_url: "https://r.example/v2/a/blobs".to_owned(),
            };
            let (layer, len) = (LayerRef::Remote(Arc::new(remote)), bytes.len() as u64);
            if absent {
                let file = tempfile::tempfile().unwrap();
                file.set_len(len).unwrap();
                return Blob::partial(layer, file, len, Arc::new(Nothing));
            }
            Blob::complete(layer, File::open(path).unwrap(), len)
        });
        OpenStack::of(blobs.collect()).unwrap()
    };
    let stack = remotes(false);
    let key = key(&stack);
    let read = Image::load(stack).unwrap();
    let file = tables_of(&read, key);
    let mapped = Image::load(with_tables(remotes(true), file)).unwrap();
    assert_eq!(mapped.serial(5), read.serial(5));
    assert!(mapped.index().iter().eq(read.index().iter()));
}

#[test]
fn layers_above_those_of_the_tables_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let paths = forms(dir.path());
    let (below, above) = paths.split_at(3);
    let stack = open_stack(below);
    let file = tables_of(&Image::load(stack.clone()).unwrap(), key(&stack));
    let above: Vec<LayerRef> = above.iter().map(LayerRef::from).collect();
    let stack = with_tables(stack, file).below(&above).unwrap();
    let mixed = Image::load(stack).unwrap();
    let read = Image::open(&Stack::new(&paths)).unwrap();
    assert!(mixed.index().iter().eq(read.index().iter()));
    assert!(pieces(&mixed) == pieces(&read));
}

#[test]
fn tables_of_other_layers_are_not_used() {
    let dir = tempfile::tempdir().unwrap();
    let paths = forms(dir.path());
    let stack = open_stack(&paths[..2]);
    let image = Image::load(stack.clone()).unwrap();
    let file = tables_of(&image, key(&stack));
    let expected = pieces(&Image::open(&Stack::new(&paths[2..])).unwrap());
    let other = with_tables(open_stack(&paths[2..]), file.try_clone().unwrap());
    assert!(pieces(&Image::load(other).unwrap()) == expected);
    // The layer has the same name and the same length, and other bytes.
    let new = std::fs::read(&paths[0]).unwrap();
    std::fs::write(dir.path().join("new"), new).unwrap();
    std::fs::rename(dir.path().join("new"), &paths[0]).unwrap();
    let replaced = open_stack(&paths[..2]);
    assert_ne!(key(&replaced), key(&stack));
    let writer = TablesWriter::new(tempfile::tempfile().unwrap(), key(&replaced));
    assert!(matches!(writer.write(&image), Err(WriteError::Changed)));
}

#[test]
fn a_file_cut_at_any_length_is_not_used() {
    let dir = tempfile::tempdir().unwrap();
    let stack = open_stack(&forms(dir.path()));
    let image = Image::load(stack.clone()).unwrap();
    let expected = pieces(&image);
    let file = tables_of(&image, key(&stack));
    let len = file.metadata().unwrap().len();
    let mut lengths: Vec<_> = (0..len).step_by(509).chain([len - 1, 4095, 4096]).collect();
    lengths.push(len + 1);
    for cut in lengths {
        let short = changed(&file, |bytes| bytes.resize(cut as usize, 0));
        let read = Image::load(with_tables(stack.clone(), short)).unwrap();
        assert!(read.index().iter().eq(image.index().iter()), "{cut}");
    }
    assert!(pieces(&image) == expected);
}

#[test]
fn tables_that_do_not_fit_leave_an_empty_file() {
    let dir = tempfile::tempdir().unwrap();
    let stack = open_stack(&forms(dir.path()));
    let image = Image::load(stack.clone()).unwrap();
    // A file that cannot grow, as on a full file system.
    let flags = MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC;
    let file = File::from(memfd_create("tables", flags).unwrap());
    file.set_len(HEADER_LEN as u64 + 8192).unwrap();
    fcntl_add_seals(&file, SealFlags::GROW).unwrap();
    let writer = TablesWriter::new(file.try_clone().unwrap(), key(&stack));
    let error = writer.write(&image).unwrap_err();
    assert!(matches!(error, WriteError::Write(_)), "{error}");
    assert_eq!(file.metadata().unwrap().len(), 0);
}

#[test]
fn reads_fail_once_the_file_is_cut_under_its_mapping() {
    let dir = tempfile::tempdir().unwrap();
    let stack = open_stack(&forms(dir.path()));
    let file = tables_of(&Image::load(stack.clone()).unwrap(), key(&stack));
    let mapped = Image::load(with_tables(stack, file.try_clone().unwrap())).unwrap();
    assert!(pieces(&mapped).iter().all(Option::is_some));
    file.set_len(0).unwrap();
    assert!(pieces(&mapped).iter().all(Option::is_none));
    assert!(matches!(mapped.check_tables(), Err(Error::TablesLost)));
}

/// Opens an image with damaged tables whose checksums were not compared, and reads all of it.
fn survives(stack: &OpenStack, file: File) {
    let image = Image::load_in_any_order(with_tables(stack.clone(), file));
    if let Ok(image) = image {
        let _ = pieces(&image);
        let last = image.size().div_ceil(512).saturating_sub(1);
        let _ = Reader::new().read(image.at_own_size(), Sector(last), &mut [0; 512]);
    }
}

#[test]
fn no_damage_to_the_tables_does_more_than_fail_reads() {
    let dir = tempfile::tempdir().unwrap();
    let stack = open_stack(&forms(dir.path()));
    let file = tables_of(&Image::load(stack.clone()).unwrap(), key(&stack));
    let len = file.metadata().unwrap().len();
    let mut random = Random::new(7);
    for round in 0..400 {
        let damaged = changed(&file, |bytes| {
            for _ in 0..1 + round % 40 {
                let at = HEADER_LEN as u64 + random.below(len - HEADER_LEN as u64);
                bytes[at as usize] = random.any() as u8;
            }
        });
        survives(&stack, damaged);
    }
    let mut bytes = [0; HEADER_LEN];
    file.read_exact_at(&mut bytes, 0).unwrap();
    let (_, layout) = Header::decode(&bytes, len).unwrap();
    let sections = [
        layout.nodes..layout.bases,
        layout.bases..layout.starts,
        layout.starts..layout.values,
        layout.values..layout.len,
    ];
    for section in sections {
        for byte in [0, 0x01, 0x7f, 0x80, 0xff] {
            let range = section.start as usize..section.end as usize;
            survives(
                &stack,
                changed(&file, |bytes| bytes[range.clone()].fill(byte)),
            );
            survives(
                &stack,
                changed(&file, |bytes| {
                    let odd = bytes[range].iter_mut().skip(3).step_by(5);
                    odd.for_each(|place| *place = byte);
                }),
            );
        }
    }
    // Pages that never reached storage.
    for page in (HEADER_LEN as u64..len).step_by(4096) {
        let end = len.min(page + 4096) as usize;
        survives(
            &stack,
            changed(&file, |bytes| bytes[page as usize..end].fill(0)),
        );
    }
}
