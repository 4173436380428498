//! `ovbd commit`: what it makes of writable layers.

use super::create::{Bare, bare};
use super::writable::*;
use super::*;
use ovbd_vhost::format::lsmt::Mapping;
use ovbd_vhost::format::lsmt::writable::Kind;
use ovbd_vhost::tool::commit;
use ovbd_vhost::tool::loaded_stack::{LoadedStack, WritableLayerReader};
use ovbd_vhost::tool::open_files::StackFiles;
use ovbd_vhost::writable::extent_map::ExtentMap;

const PAIR: [&str; 4] = [
    "--uuid",
    "11111111-2222-3333-4444-555555555555",
    "--message",
    "golden pair",
];

/// As upstream commits the same writable layer: raw byte for byte, the rest but for the codecs'
/// bytes.
#[test]
fn golden_pairs() {
    let dir = tempfile::tempdir().unwrap();
    golden::copy_upper(&golden::find("10-upper-append"), dir.path());
    let upper = ["commit", "--upper", "data=upper.data,index=upper.index"];
    for (name, args) in [
        ("raw.obd", &["--algorithm", "none"][..]),
        ("lz4.obd", &[]),
        ("zstd.obd", &["--algorithm", "zstd"]),
        ("lz4.tar", &["--tar"]),
    ] {
        let args = [&upper[..], &["-o", name], args, &PAIR].concat();
        succeed(&dir, &args, b"");
        let expected = golden::path(&format!("commit-pairs/{name}"));
        let found = dir.path().join(name);
        assert!(bare(&found).bytes == bare(&expected).bytes, "{name}");
        let (found, expected) = (fs::read(found).unwrap(), fs::read(expected).unwrap());
        match name {
            "raw.obd" => assert!(found == expected),
            "lz4.tar" => {
                // The name of the payload's length is that of its digits.
                let known = |bytes: &[u8]| [&bytes[..512], &bytes[1024..1536]].concat();
                assert!(known(&found) == known(&expected));
                assert_eq!(
                    zfile_fields(&found[1536..]),
                    zfile_fields(&expected[1536..])
                );
            }
            _ => assert_eq!(zfile_fields(&found), zfile_fields(&expected), "{name}"),
        }
    }
}

/// What a ZFile's header says, but for what follows from the length of compressed blocks.
fn zfile_fields(bytes: &[u8]) -> Vec<Vec<u8>> {
    [0..28, 32..40, 48..64, 68..512]
        .map(|range| bytes[range].to_vec())
        .to_vec()
}

#[test]
fn golden_uppers_of_all_kinds() {
    for name in [
        "10-upper-append",
        "10b-upper-sparse",
        "10d-upper-sparse-discard",
        "10h-upper-empty",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let case = golden::find(name);
        golden::copy_upper(&case, dir.path());
        let upper = "data=upper.data,index=upper.index";
        succeed(&dir, &["commit", "--upper", upper, "-o", "top"], b"");
        let mut layers: Vec<_> = case
            .layers
            .iter()
            .map(|path| path.to_str().unwrap())
            .collect();
        succeed(
            &dir,
            &[&["merge", "-o", "merged", "--upper", upper], &layers[..]].concat(),
            b"",
        );
        for args in [
            [&["export", "-o", "raw", "--upper", upper], &layers[..]].concat(),
            {
                layers.push("top");
                [&["export", "-o", "raw"], &layers[..]].concat()
            },
            vec!["export", "-o", "raw", "merged"],
        ] {
            succeed(&dir, &args, b"");
            let raw = fs::read(dir.path().join("raw")).unwrap();
            assert_eq!(export::sha256(&raw), case.sha256, "{name} {args:?}");
        }
    }
}

/// Whatever was written, by a process that was killed too: the layer upon the lower one reads as
/// the writable layer did, and so do both merged, and the writable layer sealed.
#[test]
fn all_ways_to_a_layer_read_the_same() {
    for (kind, seed) in KINDS
        .into_iter()
        .flat_map(|kind| (0..8).map(move |seed| (kind, seed)))
    {
        let dir = tempfile::tempdir().unwrap();
        let mut random = Random::new(seed);
        let len = [1 << 20, 20 << 20, (5 << 20) + 512 * 7][seed as usize % 3];
        let mut disk = lower(&dir, seed, len);
        let paths = paths(&dir);
        write_at_random(&paths, kind, &mut random, &mut disk);
        let before = [&paths.data, &paths.index].map(|path| fs::read(path).unwrap());
        for (number, args) in [
            &["--algorithm", "none"][..],
            &["--threads", "1"],
            &["--threads", "5", "--block-size", "16K"],
            &["--algorithm", "zstd", "--tar"],
        ]
        .into_iter()
        .enumerate()
        {
            succeed(
                &dir,
                &[&["commit", "--upper", UPPER, "-o", "top"], args].concat(),
                b"",
            );
            assert_reads(&dir, &["lower", "top"], &disk);
            let merge = ["merge", "lower", "--upper", UPPER, "-o", "merged"];
            succeed(&dir, &[&merge[..], args].concat(), b"");
            assert_reads(&dir, &["merged"], &disk);
            let upper = LoadedStack::of(
                None,
                Some(WritableLayerReader::open(&paths, ExtentMap::apart()).unwrap()),
            );
            let Bare {
                header,
                trailer,
                bytes,
                mappings,
            } = bare(&dir.path().join("top"));
            assert_eq!(
                commit::least_mappings(&upper),
                runs(&mappings),
                "known before"
            );
            let files = StackFiles {
                stack: Stack::new([dir.path().join("lower")]),
                upper: Some(paths.clone()),
            };
            let whole = LoadedStack::load(files.open().unwrap());
            let merged = bare(&dir.path().join("merged")).mappings;
            assert_eq!(
                commit::least_mappings(&whole.unwrap()),
                runs(&merged),
                "known before"
            );
            assert_eq!(
                (header.uuid, header.parent_uuid),
                (trailer.uuid, trailer.parent_uuid)
            );
            assert_eq!(header.uuid.as_u128(), 0x77);
            assert_eq!(header.parent_uuid.as_u128(), 0x66);
            assert_eq!(header.virtual_size, len as u64);
            if number > 0 {
                assert!(bytes == bare(&dir.path().join("plain")).bytes, "{args:?}");
            } else {
                fs::copy(dir.path().join("top"), dir.path().join("plain")).unwrap();
            }
        }
        let stdout = succeed(&dir, &["export", "lower", "--upper", UPPER, "-o", "-"], b"");
        assert_eq!(difference(&stdout, &disk), None);
        for layers in [
            &["lower", "--upper", UPPER][..],
            &["lower", "plain"],
            &["merged"],
        ] {
            succeed(&dir, &[&["check"], layers].concat(), b"");
        }
        let after = [&paths.data, &paths.index].map(|path| fs::read(path).unwrap());
        assert!(before == after, "reading changes nothing");

        succeed(&dir, &["seal", "--upper", UPPER], b"");
        assert_reads(&dir, &["lower", "u.data"], &disk);
        assert_eq!(names(&dir), ["lower", "merged", "plain", "top", "u.data"]);
        succeed(&dir, &["check", "lower", "u.data"], b"");
    }
}

/// Runs of sectors of a kind.
fn runs(mappings: &[Mapping]) -> u64 {
    let apart = |one: &Mapping, next: &Mapping| {
        one.end() != next.offset() || one.is_zeroed() != next.is_zeroed()
    };
    1 + mappings
        .windows(2)
        .filter(|pair| apart(&pair[0], &pair[1]))
        .count() as u64
}

/// Every other sector is made zero, more often than upstream's reader takes.
#[test]
fn a_layer_that_upstream_does_not_open_is_made_with_a_warning() {
    let dir = tempfile::tempdir().unwrap();
    let paths = paths(&dir);
    const PIECES: u64 = 1_000_000;
    ovbd_vhost::writable::create(&paths, Kind::Hybrid, &header(PIECES * 1024)).unwrap();
    let zeroed = |number| Mapping::zeroed(Sector(number * 2), 1, Sector(8)).unwrap();
    let entries: Vec<u8> = (0..PIECES)
        .flat_map(|number| zeroed(number).encode())
        .collect();
    let mut index = File::options().append(true).open(&paths.index).unwrap();
    index.write_all(&entries).unwrap();
    drop(index);
    for args in [
        &["commit", "--upper", UPPER, "-o", "commit"][..],
        &[
            "merge",
            "--upper",
            UPPER,
            "-o",
            "merge",
            "--algorithm",
            "none",
        ],
        &["seal", "--upper", UPPER],
    ] {
        let output = ovbd(&dir, args, b"");
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{stderr}");
        assert!(
            stderr.starts_with("ovbd: warning: the layer has 1000000 mappings"),
            "{stderr}"
        );
        assert!(
            stderr.contains("999936") && stderr.lines().count() == 1,
            "{stderr}"
        );
    }
    for layer in ["commit", "merge", "u.data"] {
        assert_eq!(
            open(&dir, &[layer]).layers()[0].mappings() as u64,
            PIECES,
            "{layer}"
        );
    }
}

/// As upstream joins them: by parts of 64 sectors, counted from the start of each piece, and zeroed
/// ranges whole.
#[test]
fn neighbours_are_joined_as_they_arrived() {
    let dir = tempfile::tempdir().unwrap();
    let paths = paths(&dir);
    ovbd_vhost::writable::create(&paths, Kind::Append, &header(64 << 20)).unwrap();
    let upper = open_upper(&paths);
    // 250 parts of two pieces, and five of the third; then 115 of it, 5 and a rest of 62, and 125.
    for (start, sectors) in [
        (0, 8000),
        (8000, 8000),
        (16000, 8000),
        (24000, 382),
        (24382, 8000),
    ] {
        write(&upper, start, &mut tagged(sectors * 512, start));
        upper
            .discard(common::sectors(40_000 + start, sectors as u64))
            .unwrap();
        upper.flush().unwrap();
    }
    close(upper);
    succeed(&dir, &["commit", "--upper", UPPER, "-o", "top"], b"");
    let mappings = bare(&dir.path().join("top")).mappings;
    let lengths: Vec<_> = mappings
        .iter()
        .map(|mapping| (mapping.length(), mapping.is_zeroed()))
        .collect();
    let expected = [(16320, false), (16062, false), (16000, true), (16382, true)];
    assert_eq!(lengths, expected);
}

#[test]
fn a_file_that_is_too_short_is_told_how_long_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let paths = paths(&dir);
    ovbd_vhost::writable::create(&paths, Kind::Hybrid, &header(1 << 20)).unwrap();
    let commit = ["commit", "--upper", UPPER, "-o", "top"];
    for (path, what) in [(&paths.index, "index file"), (&paths.data, "data file")] {
        for len in [100, 4095, 0] {
            fs::write(path, vec![0; len]).unwrap();
            let short = fail(&dir, 1, &commit);
            let said = format!(
                "{} has {len} bytes; the {what}",
                path.file_name().unwrap().display()
            );
            assert!(
                short.contains(&said) && short.contains("at least 4096"),
                "{short}"
            );
        }
    }
}

#[test]
fn what_is_in_use_or_wrong_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let paths = paths(&dir);
    ovbd_vhost::writable::create(&paths, Kind::Hybrid, &header(1 << 20)).unwrap();
    let upper = open_upper(&paths);
    for args in [
        &["commit", "--upper", UPPER, "-o", "top"][..],
        &["seal", "--upper", UPPER],
        &["merge", "--upper", UPPER, "-o", "top"],
        &["resize", "--upper", UPPER, "2M"],
        &["export", "--upper", UPPER, "-o", "raw"],
        &["inspect", "--upper", UPPER],
    ] {
        let busy = fail(&dir, 1, args);
        assert!(
            busy.contains("u.data is in use by another process"),
            "{busy}"
        );
    }
    close(upper);
    for output in ["u.data", "u.index"] {
        let input = fail(&dir, 1, &["commit", "--upper", UPPER, "-o", output]);
        assert!(input.contains("is also an input"), "{input}");
    }
    let swapped = "data=u.index,index=u.data";
    let swapped = fail(&dir, 1, &["commit", "--upper", swapped, "-o", "top"]);
    assert!(
        swapped.contains("is not the data file of a writable layer"),
        "{swapped}"
    );
    fail(&dir, 2, &["commit", "--upper", "u.data", "-o", "top"]);
    fail(&dir, 2, &["commit", "--upper", UPPER]);
    fail(
        &dir,
        2,
        &[
            "commit",
            "--upper",
            UPPER,
            "-o",
            "t",
            "--algorithm",
            "none",
            "--no-checksum",
        ],
    );
    fail(&dir, 2, &["seal"]);
    fail(&dir, 2, &["merge", "-o", "top"]);
    succeed(&dir, &["seal", "--upper", UPPER], b"");
    let sealed = fail(&dir, 1, &["commit", "--upper", UPPER, "-o", "top"]);
    assert!(sealed.contains("is sealed"), "{sealed}");
    assert_eq!(names(&dir), ["u.data"]);
}
