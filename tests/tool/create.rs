//! `ovbd create`: what it writes, and what it reads back as.

use super::*;
use ovbd_vhost::format::lsmt::{Header, HeaderKind, IndexReader, Mapping, PADDING};
use ovbd_vhost::format::{tar, zfile};
use ovbd_vhost::image::Container;
use ovbd_vhost::source::Blob;

/// A layer taken out of its wrappers.
pub struct Bare {
    pub bytes: Vec<u8>,
    pub header: Header,
    pub trailer: Header,
    pub mappings: Vec<Mapping>,
}

pub fn bare(path: &Path) -> Bare {
    let container = Container::load(Blob::open(path).unwrap().into()).unwrap();
    let mut bytes = vec![0; container.len() as usize];
    Reader::new().read_layer(&container, 0, &mut bytes).unwrap();
    let trailer_at = bytes.len() - 4096;
    let header = Header::decode(bytes.first_chunk().unwrap(), HeaderKind::Header).unwrap();
    let trailer = Header::decode(bytes.last_chunk().unwrap(), HeaderKind::Trailer).unwrap();
    let mut mappings = Vec::new();
    let mut index = IndexReader::new(&trailer, trailer_at as u64).unwrap();
    let index_bytes = &bytes[trailer.index_offset as usize..trailer_at];
    index.read(index_bytes, &mut mappings).unwrap();
    Bare {
        header,
        trailer,
        mappings,
        bytes,
    }
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

const UUID: &str = "0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9";

#[test]
fn every_form_reads_back() {
    let dir = tempfile::tempdir().unwrap();
    for (number, (args, len)) in [
        (&[][..], 3 << 20),
        (&["--algorithm", "none"], (3 << 20) + 512 * 3),
        (&["--algorithm", "none", "--tar"], 4096),
        (&["--block-size", "4096", "--no-checksum"], 700_001),
        (&["--block-size", "64K", "--algorithm", "zstd"], 2_222_222),
        (&["--block-size", "32k", "--tar"], 5 << 20),
        (
            &[
                "--block-size",
                "8192",
                "--algorithm",
                "zstd",
                "--tar",
                "--no-checksum",
            ],
            1 << 20,
        ),
        (&[], 1),
        (&["--algorithm", "zstd"], 512),
        (&["--message", "m", "--uuid", UUID], 511),
    ]
    .into_iter()
    .enumerate()
    {
        // Noise in blocks of 64 KiB is refused; see below.
        let mut bytes = disk(number as u64, len);
        if args.contains(&"64K") {
            bytes.chunks_mut(8).for_each(|chunk| chunk[..4].fill(7));
        }
        bytes[0] |= 1;
        write_sparse(&dir.path().join("raw"), &bytes);
        let create = ["create", "--from", "raw", "out.obd"];
        succeed(&dir, &[&create[..], args].concat(), b"");
        assert_reads(&dir, &["out.obd"], &bytes);
    }
    assert_eq!(names(&dir), ["out.obd", "raw"]);
}

#[test]
fn a_layer_is_as_the_format_says() {
    let dir = tempfile::tempdir().unwrap();
    let mut bytes = disk(1, 30 << 20);
    bytes[9 << 20..21 << 20].fill(0x5A); // longer than one mapping
    bytes[12 << 20..(12 << 20) + 8191].fill(0); // one whole unit of zeros
    write_sparse(&dir.path().join("raw"), &bytes);
    let message = "m".repeat(256);
    let mut all = Vec::new();
    for algorithm in ["none", "lz4", "zstd"] {
        let args = [
            "--algorithm",
            algorithm,
            "--uuid",
            UUID,
            "--message",
            &message,
        ];
        let create = ["create", "--from", "raw", "out.obd"];
        succeed(&dir, &[&create[..], &args].concat(), b"");
        all.push(bare(&dir.path().join("out.obd")));
    }
    let Bare {
        bytes: layer,
        header,
        trailer,
        mappings,
    } = &all[0];
    for packed in &all[1..] {
        assert!(packed.bytes == *layer, "inside the ZFile is the same layer");
    }

    assert_eq!(
        (le32(layer, 28), le32(layer, layer.len() - 4096 + 28)),
        (7, 6)
    );
    assert_eq!((header.index_offset, header.index_entries), (0, 0));
    for side in [header, trailer] {
        assert_eq!(side.virtual_size, 30 << 20);
        assert_eq!(side.uuid.to_string(), UUID);
        assert!(side.parent_uuid.is_nil());
        assert_eq!(side.message, message.as_bytes());
    }
    assert_eq!(
        &layer[56..93],
        format!("{}\0", UUID.to_uppercase()).as_bytes()
    );

    let (entries, index_end) = (trailer.index_entries as usize, layer.len() - 4096);
    assert_eq!(trailer.index_offset as usize + entries * 16, index_end);
    assert!(entries.is_multiple_of(256) && entries - mappings.len() < 256);
    let padding = &layer[trailer.index_offset as usize + mappings.len() * 16..index_end];
    assert!(padding.chunks(16).all(|entry| entry == PADDING));

    let mut next = 8;
    for pair in mappings.windows(2) {
        let continues = pair[0].end() == pair[1].offset();
        let joined = pair[0].length() + pair[1].length().min(8);
        assert!(!continues || joined > 16382, "{pair:?} could be one");
    }
    for mapping in mappings {
        assert!(!mapping.is_zeroed() && mapping.length() <= 16382);
        assert_eq!(
            mapping.moffset(),
            Sector(next),
            "packed in the order of the disk"
        );
        next += u64::from(mapping.length());
    }
    assert_eq!(trailer.index_offset, next * 512);
    assert!(mappings.iter().any(|mapping| mapping.length() == 16376));
    let hole = Sector((12 << 20) / 512);
    let covers = |mapping: &Mapping| mapping.offset() <= hole && hole < mapping.end();
    assert!(
        !mappings.iter().any(covers),
        "a unit of zeros is not stored"
    );
}

#[test]
fn wrappers_are_as_the_format_says() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = disk(5, 1_000_000);
    fs::write(dir.path().join("raw"), &bytes).unwrap();
    let args = [
        "create",
        "--from",
        "raw",
        "out.obd",
        "--tar",
        "--block-size",
        "16384",
    ];
    succeed(&dir, &args, b"");
    let file = fs::read(dir.path().join("out.obd")).unwrap();
    let payload = tar::payload(&file[..1536]).unwrap().unwrap();
    assert_eq!(payload.offset, 1536);
    assert!(file.len().is_multiple_of(512));
    let (inner, after) = file[1536..].split_at(payload.len as usize);
    assert_eq!(after.len() as u64, tar::trailing(payload.len));
    assert!(after.iter().all(|byte| *byte == 0));
    let listed = Command::new("tar")
        .arg("-tf")
        .arg(dir.path().join("out.obd"))
        .output();
    assert_eq!(listed.unwrap().stdout, b"overlaybd.commit\n");

    let (header, trailer) = (&inner[..512], &inner[inner.len() - 512..]);
    assert_eq!((le64(header, 32), le64(trailer, 32)), (0x1B, 0x16));
    assert_eq!(header[40..96], trailer[40..96]);
    let header = zfile::Header::decode(header.try_into().unwrap(), HeaderKind::Header).unwrap();
    assert!(header.digest && header.format.checksum);
    assert_eq!(header.format.block_size, 16384);
    assert_eq!(header.format.algorithm, zfile::Algorithm::Lz4);
    let layer = bare(&dir.path().join("out.obd")).bytes.len() as u64;
    assert_eq!(header.totals.original_size, layer);
    assert_eq!(header.totals.blocks, layer.div_ceil(16384));
    let table_end = header.totals.table_offset + header.totals.blocks * 4;
    assert_eq!(table_end + 512, payload.len);
}

#[test]
fn the_output_depends_on_the_content_alone() {
    let dir = tempfile::tempdir().unwrap();
    for (number, args) in [
        &["--algorithm", "none"][..],
        &["--algorithm", "none", "--tar"],
        &[],
        &["--tar", "--block-size", "32K"],
        &["--algorithm", "zstd", "--no-checksum"],
    ]
    .into_iter()
    .enumerate()
    {
        for len in [100, 40_000, 5_000_001] {
            let mut bytes = disk(number as u64 + 9, len);
            bytes[..len / 50].fill(0); // a hole, or zeros to be read
            write_sparse(&dir.path().join("sparse"), &bytes);
            fs::write(dir.path().join("full"), &bytes).unwrap();
            let create = |from: &str, threads: &str| {
                let create = ["create", "--from", from, "out.obd", "--threads", threads];
                // The default depends on the length, which a long pipe does not have at its start.
                let uuid: &[_] = if len > 1 << 20 {
                    &["--uuid", UUID]
                } else {
                    &[]
                };
                succeed(&dir, &[&create[..], args, uuid].concat(), &bytes);
                fs::read(dir.path().join("out.obd")).unwrap()
            };
            let expected = create("full", "1");
            for (from, threads) in [("full", "7"), ("sparse", "2"), ("-", "1"), ("-", "3")] {
                let same = create(from, threads) == expected;
                assert!(same, "{args:?}, {len} bytes, {from} with {threads} threads");
            }
        }
    }
    let uuid = |name: &str, args: &[&str]| {
        succeed(
            &dir,
            &[&["create", "--from", name, "out.obd"], args].concat(),
            b"",
        );
        open(&dir, &["out.obd"]).layers()[0].uuid()
    };
    let first = uuid("full", &[]);
    assert_eq!(first.get_version_num(), 8);
    assert_ne!(first, uuid("full", &["--message", "other"]));
    fs::write(dir.path().join("other"), b"other").unwrap();
    assert_ne!(first, uuid("other", &[]));
}

/// Disks that begin alike, as those of one base image do, get names of their own.
#[test]
fn the_default_uuid_depends_on_the_whole_image() {
    let dir = tempfile::tempdir().unwrap();
    let uuid = |bytes: &[u8]| {
        fs::write(dir.path().join("raw"), bytes).unwrap();
        succeed(&dir, &["create", "--from", "raw", "out.obd"], b"");
        open(&dir, &["out.obd"]).layers()[0].uuid()
    };
    let bytes = tagged(4 << 20, 1);
    let first = uuid(&bytes);
    assert_eq!(first, uuid(&bytes));
    let mut end = bytes.clone();
    end[3 << 20..].fill(7);
    assert_ne!(first, uuid(&end), "another end");
    let longer = [&bytes[..], &[0; 512]].concat();
    assert_ne!(first, uuid(&longer), "another size");
}

/// A later state of a disk: some of it changed, zeroed or swapped, and perhaps another length.
fn later(random: &mut Random, earlier: &[u8]) -> Vec<u8> {
    let mut bytes = earlier.to_vec();
    let len = match random.below(3) {
        0 => bytes.len(),
        _ => random.within(1..=400_000) as usize,
    };
    bytes.resize(len, 0);
    for _ in 0..random.below(12) {
        let start = random.below(len as u64) as usize;
        let end = len.min(start + random.within(1..=30_000) as usize);
        match random.below(3) {
            0 => bytes[start..end].fill(0),
            1 => bytes[start..end].copy_from_slice(&tagged(end - start, random.any())),
            _ => bytes[start] ^= 1,
        }
    }
    bytes
}

#[test]
fn a_chain_of_differences_reads_back() {
    for seed in 0..12 {
        let dir = tempfile::tempdir().unwrap();
        let mut random = Random::new(seed);
        let mut bytes = disk(seed, 200_000 + seed as usize * 17);
        let mut stack: Vec<String> = Vec::new();
        for number in 0..8 {
            let name = format!("{number}.obd");
            write_sparse(&dir.path().join("raw"), &bytes);
            let from = if random.coin() { "raw" } else { "-" };
            let parents = stack.join(",");
            let mut args = vec!["create", "--from", from, &name];
            if !stack.is_empty() {
                args.extend(["--parent", &parents]);
            }
            args.extend([
                "--algorithm",
                ["none", "lz4", "zstd"][random.below(3) as usize],
            ]);
            succeed(&dir, &args, &bytes);

            let below: Vec<&str> = stack.iter().map(String::as_str).collect();
            let stacked = [&below[..], &[&name]].concat();
            assert_reads(&dir, &stacked, &bytes);
            let layer = bare(&dir.path().join(&name));
            if let Some(parent) = below.last() {
                let parent = bare(&dir.path().join(parent));
                assert_eq!(layer.trailer.parent_uuid, parent.trailer.uuid);
                assert_ne!(layer.trailer.uuid, parent.trailer.uuid);
                assert_only_differences(&layer, &bytes, &content_of(&open(&dir, &below)));
            }
            stack.push(name);
            bytes = later(&mut random, &bytes);
        }
    }
}

/// Each unit that a layer maps must differ from what the stack below shows there, or lie beyond it.
fn assert_only_differences(layer: &Bare, new: &[u8], below: &[u8]) {
    for mapping in &layer.mappings {
        let (start, end) = (mapping.offset().0 * 512, mapping.end().0 * 512);
        for at in (start as usize..end as usize).step_by(4096) {
            let unit = |disk: &[u8]| {
                let mut unit = disk.get(at..).unwrap_or_default().to_vec();
                unit.resize(4096, 0);
                unit
            };
            let beyond = at + 4096 > below.len();
            assert!(beyond || unit(new) != unit(below), "byte {at} is the same");
            let is_zero = unit(new) == [0; 4096];
            assert_eq!(mapping.is_zeroed(), is_zero, "byte {at}");
        }
    }
}

#[test]
fn the_same_again_is_an_empty_layer() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = disk(3, 512 * 1001);
    write_sparse(&dir.path().join("raw"), &bytes);
    succeed(&dir, &["create", "--from", "raw", "a"], b"");
    succeed(
        &dir,
        &["create", "--from", "raw", "b", "--parent", "a"],
        b"",
    );
    assert!(bare(&dir.path().join("b")).mappings.is_empty());
    assert_reads(&dir, &["a", "b"], &bytes);
}

#[test]
fn a_hole_hides_much_data_with_few_mappings() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = tagged(24 << 20, 4);
    fs::write(dir.path().join("raw"), &bytes).unwrap();
    succeed(
        &dir,
        &["create", "--from", "raw", "a", "--algorithm", "none"],
        b"",
    );
    let hole = File::create(dir.path().join("hole")).unwrap();
    hole.set_len(1 << 40).unwrap();
    succeed(
        &dir,
        &["create", "--from", "hole", "b", "--parent", "a"],
        b"",
    );
    let layer = bare(&dir.path().join("b"));
    assert_eq!(layer.trailer.virtual_size, 1 << 40);
    assert_eq!(layer.mappings.len(), 4, "24 MiB in steps of 8");
    assert!(layer.mappings.iter().all(|mapping| mapping.is_zeroed()));
    assert!(
        open(&dir, &["a", "b"])
            .at_own_size()
            .pieces(SectorRange::new(Sector(0), Sector(1 << 31)))
            .all(|piece| { matches!(piece, ovbd_vhost::image::pieces::Piece::Zero { .. }) })
    );
}

#[test]
fn failures_leave_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().to_owned();
    fs::write(root.join("raw"), tagged(300_000, 1)).unwrap();
    fs::write(root.join("empty"), b"").unwrap();
    fs::write(root.join("old"), b"as it was").unwrap();
    fs::create_dir(root.join("folder")).unwrap();
    let before = names(&dir);
    let create = |args: &[&str]| fail(&dir, 1, &[&["create"], args].concat());

    assert!(create(&["--from", "absent", "old"]).contains("cannot open absent"));
    assert!(create(&["--from", "empty", "old"]).contains("empty is empty"));
    assert!(create(&["--from", "-", "old"]).contains("standard input is empty"));
    assert!(create(&["--from", "folder", "old"]).contains("folder"));
    assert!(create(&["--from", "raw", "folder"]).contains("exists and is not a regular file"));
    assert!(create(&["--from", "raw", "no/such/folder"]).contains("no/such/folder"));
    assert!(create(&["--from", "raw", "raw"]).contains("is also an input"));
    let not_a_layer = create(&["--from", "raw", "old", "--parent", "raw"]);
    assert!(not_a_layer.contains("not a valid layer"), "{not_a_layer}");
    // Noise does not compress, and upstream cannot read blocks of more than 64 KiB.
    let long = create(&["--from", "raw", "old", "--block-size", "65536"]);
    assert!(
        long.contains("block 1") && long.contains("--block-size"),
        "{long}"
    );

    assert_eq!(names(&dir), before);
    assert_eq!(fs::read(root.join("old")).unwrap(), b"as it was");
    std::os::unix::fs::symlink("old", root.join("link")).unwrap();
    succeed(&dir, &["create", "--from", "raw", "link"], b"");
    assert!(
        root.join("link").is_symlink(),
        "the file behind the link is replaced"
    );
    assert_reads(&dir, &["old"], &tagged(300_000, 1));
}

#[test]
fn a_parent_that_ignores_its_children_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("raw"), tagged(1 << 20, 1)).unwrap();
    let output = Command::new("env")
        .args(["--ignore-signal=CHLD", env!("CARGO_BIN_EXE_ovbd")])
        .args(["create", "--from", "raw", "out"])
        .current_dir(dir.path())
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    succeed(&dir, &["check", "out"], b"");
}
