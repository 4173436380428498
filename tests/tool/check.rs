//! `ovbd check`: it finds each kind of damage, and says where.

use std::num::NonZero;

use indicatif::ProgressBar;
use ovbd_vhost::format::crc;
use ovbd_vhost::format::lsmt::{Header, HeaderKind};
use ovbd_vhost::format::zfile::{self, Algorithm, BlockFormat, Totals};
use ovbd_vhost::tool;
use ovbd_vhost::tool::open_files::StackFiles;
use uuid::Uuid;

use super::*;

/// Runs a check: its exit code and lines.
fn check(dir: &TempDir, layers: &[&str]) -> (i32, Vec<String>) {
    let output = ovbd(dir, &[&["check"], layers].concat(), b"");
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(
        stderr.is_empty() || stderr.contains("has parent") || stderr.contains("was made for"),
        "{stderr}"
    );
    let text = String::from_utf8(output.stdout).unwrap();
    (
        output.status.code().unwrap(),
        text.lines().map(str::to_owned).collect(),
    )
}

/// The lines about what is broken; the exit code must fit them.
fn broken(dir: &TempDir, layers: &[&str]) -> Vec<String> {
    let (code, mut lines) = check(dir, layers);
    let last = lines.pop().unwrap();
    lines.retain(|line| line.starts_with("broken: "));
    assert_eq!(code, i32::from(!lines.is_empty()), "{lines:?} {last}");
    assert_eq!(last.starts_with("ok;"), lines.is_empty(), "{last}");
    lines
}

/// A folder with a layer `a` of noise, made with these arguments, and its bytes.
fn layer(args: &[&str]) -> (TempDir, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let mut bytes = tagged(200 << 12, 1);
    bytes[50 << 12..60 << 12].fill(0);
    fs::write(dir.path().join("raw"), bytes).unwrap();
    succeed(
        &dir,
        &[&["create", "--from", "raw", "a"], args].concat(),
        b"",
    );
    let layer = fs::read(dir.path().join("a")).unwrap();
    (dir, layer)
}

/// Puts `damaged` in the layer's place: what is found broken.
fn found(dir: &TempDir, damaged: &[u8]) -> Vec<String> {
    fs::write(dir.path().join("a"), damaged).unwrap();
    broken(dir, &["a"])
}

/// The same with one bit of byte `at` flipped.
fn flipped(dir: &TempDir, layer: &[u8], at: usize) -> Vec<String> {
    let mut damaged = layer.to_vec();
    damaged[at] ^= 0x10;
    found(dir, &damaged)
}

/// The block's offset in the file and, from the table, the next one's.
fn block_at(layer: &[u8], payload: usize, block: usize) -> usize {
    let field = |at: usize| u64::from_le_bytes(layer[at..at + 8].try_into().unwrap()) as usize;
    let table = payload + field(payload + 40);
    let lens = layer[table..].chunks(4).take(block);
    let lens = lens.map(|len| u32::from_le_bytes(len.try_into().unwrap()) as usize);
    payload + 512 + lens.sum::<usize>()
}

#[test]
fn what_is_whole_is_ok() {
    let dir = tempfile::tempdir().unwrap();
    for case in golden::cases() {
        if case.has_upper || case.name.starts_with("14") {
            continue;
        }
        let layers: Vec<_> = case
            .layers
            .iter()
            .map(|path| path.to_str().unwrap())
            .collect();
        assert_eq!(broken(&dir, &[&layers.join(",")]), [""; 0], "{}", case.name);
    }
}

#[test]
fn golden_damage() {
    let dir = tempfile::tempdir().unwrap();
    for (name, expected) in [
        ("14a-flip-block-crc", "byte 789318: block 344: checksum is"),
        ("14d-flip-header-digest", "byte 0: header digest is"),
        ("14g-truncated", "no ZFile magic in the trailer"),
        (
            "14j-raw-index-moffset-oob",
            "byte 2790448: index entry 3 has 1147 sectors of data",
        ),
    ] {
        let lines = broken(&dir, &[golden::find(name).layers[0].to_str().unwrap()]);
        assert!(lines[0].contains(expected), "{name}: {lines:?}");
    }
}

#[test]
fn blocks_and_what_they_affect() {
    let (dir, layer) = layer(&["--tar"]);
    let payload = 1536;
    // Block 0 is the header, blocks 1 to 190 are data, then come the index and the trailer.
    for (block, affected) in [
        (0, "affects the layer's header"),
        (1, "affects sectors 0-7"),
        (50, "affects sectors 392-399"),
        (51, "affects sectors 480-487"),
        (190, "affects sectors 1592-1599"),
        (191, "affects the layer's index"),
        (192, "affects the layer's trailer"),
    ] {
        let at = block_at(&layer, payload, block);
        let lines = flipped(&dir, &layer, at + 3);
        let expected = format!("broken: a: byte {at}: block {block}: checksum is ");
        assert!(lines[0].starts_with(&expected), "{block}: {lines:?}");
        assert!(lines[0].ends_with(affected), "{block}: {lines:?}");
        assert_eq!(lines.len(), 1, "{lines:?}");
    }
}

#[test]
fn it_goes_on_after_the_first_finding() {
    let (dir, layer) = layer(&[]);
    let mut damaged = layer.clone();
    let blocks = [5, 77, 78, 150];
    for block in blocks {
        damaged[block_at(&layer, 0, block) + 9] ^= 1;
    }
    damaged[30] ^= 1; // the header's digest
    let table = layer.len() - 512 - 193 * 4;
    assert_eq!(block_at(&layer, 0, 193), table);
    let lines = found(&dir, &damaged);
    assert_eq!(lines.len(), 5, "{lines:?}");
    assert!(lines[0].contains("byte 0: header digest is"), "{lines:?}");
    for (line, block) in lines[1..].iter().zip(blocks) {
        assert!(line.contains(&format!(": block {block}: ")), "{line}");
    }
    fs::write(dir.path().join("b"), &damaged).unwrap();
    let lines = broken(&dir, &["a", "absent", "b"]);
    assert_eq!(lines.len(), 11, "{lines:?}");
    assert!(lines[5].contains("absent: cannot open"), "{lines:?}");
}

#[test]
fn structures_of_a_zfile() {
    let (dir, layer) = layer(&[]);
    let len = layer.len();
    let one = |lines: Vec<String>, expected: &str| {
        assert!(lines[0].contains(expected), "{lines:?}");
    };
    one(flipped(&dir, &layer, 73), "byte 0: header digest");
    let trailer = format!("byte {}: trailer digest", len - 512);
    one(flipped(&dir, &layer, len - 512 + 73), &trailer);
    let table = len - 512 - 193 * 4;
    let place = format!("byte {table}: ");
    one(
        flipped(&dir, &layer, table + 4),
        &format!("{place}block table checksum"),
    );
    one(
        found(&dir, &layer[..len - 1]),
        "no ZFile magic in the trailer",
    );
    one(found(&dir, &layer[..4096]), "no ZFile magic in the trailer");
    one(found(&dir, &layer[..100]), "content has 100 bytes; a layer");
    one(found(&dir, b""), "content has 0 bytes; a layer");

    // A checksum that is wrong over a table that is right: the blocks can be checked.
    let mut damaged = layer.clone();
    for at in [0, len - 512] {
        damaged[at + 64] ^= 1;
        damaged[at + 28..at + 32].fill(0);
        let digest = crc::raw(0, &damaged[at..at + 512]);
        damaged[at + 28..at + 32].copy_from_slice(&digest.to_le_bytes());
    }
    damaged[block_at(&layer, 0, 9) + 8] ^= 1;
    let lines = found(&dir, &damaged);
    assert!(lines[0].contains("block table checksum"), "{lines:?}");
    assert!(lines[1].contains(": block 9: "), "{lines:?}");
}

#[test]
fn structures_of_a_tar_and_of_a_bare_layer() {
    let (dir, layer) = layer(&["--tar", "--algorithm", "none"]);
    assert_eq!(found(&dir, &layer), [""; 0]);
    let cut = found(&dir, &layer[..layer.len() - 2000]);
    assert!(cut[0].contains("the tar header announces"), "{cut:?}");
    let second = flipped(&dir, &layer, 1024 + 10);
    assert!(second[0].contains("tar header at byte 1024"), "{second:?}");

    let bare = &layer[1536..layer.len() - 1024];
    assert_eq!(found(&dir, bare), [""; 0]);
    let trailer = bare.len() - 4096;
    let header = flipped(&dir, bare, 5);
    assert!(
        header[0].contains("byte 0: no LSMT magic in the header"),
        "{header:?}"
    );
    let magic = flipped(&dir, bare, trailer + 5);
    let expected = format!("byte {trailer}: no LSMT magic in the trailer");
    assert!(magic[0].contains(&expected), "{magic:?}");
    // Both real entries broken: each is told of, with its number and place.
    let index = 4096 + (190 << 12);
    let mut damaged = bare.to_vec();
    damaged[index + 8] = 0;
    damaged[index + 16 + 13] = 1;
    let lines = found(&dir, &damaged);
    assert_eq!(lines.len(), 2, "{lines:?}");
    let (first, second) = (format!("byte {index}: index entry 0"), index + 16);
    assert!(lines[0].contains(&first), "{lines:?}");
    assert!(
        lines[1].contains(&format!("byte {second}: index entry 1")),
        "{lines:?}"
    );
}

#[test]
fn notes_are_no_damage() {
    let dir = tempfile::tempdir().unwrap();
    let legacy = golden::path("base-ext4_64/ext4_64");
    let (code, lines) = check(&dir, &[legacy.to_str().unwrap()]);
    assert_eq!(code, 0);
    assert!(
        lines
            .iter()
            .any(|line| line.starts_with("note: ") && line.contains("old tools"))
    );
}

#[test]
fn a_layer_that_does_not_lie_upon_its_parent_is_found() {
    let dir = tempfile::tempdir().unwrap();
    for (number, name, parent) in [(1, "a", ""), (2, "b", "a"), (3, "c", "a,b")] {
        fs::write(dir.path().join("raw"), tagged(5000, number)).unwrap();
        let parent: &[_] = match parent {
            "" => &[],
            parent => &["--parent", parent],
        };
        let args = [&["create", "--from", "raw", name], parent].concat();
        succeed(&dir, &args, b"");
    }
    assert_eq!(check(&dir, &["a", "b", "c"]).1.len(), 1);
    for (layers, expected) in [
        (&["a", "c"][..], "broken: the stack: c has parent "),
        (&["b", "a"], "broken: the stack: b has parent "),
        (&["a", "c", "b"], "broken: the stack: c has parent "),
    ] {
        let lines = broken(&dir, layers);
        assert!(lines[0].starts_with(expected), "{lines:?}");
        let forced = [layers, &["--force"]].concat();
        assert_eq!(check(&dir, &forced).0, 0);
        for verb in ["inspect", "export", "merge"] {
            let output: &[_] = match verb {
                "inspect" => &[],
                _ => &["-o", "out"],
            };
            let args = [&[verb], layers, output].concat();
            let error = fail(&dir, 1, &args);
            assert!(error.contains("has parent"), "{error}");
            assert!(error.contains("--force"), "{error}");
            assert!(!dir.path().join("out").exists());
            let output = ovbd(&dir, &[&args[..], &["--force"]].concat(), b"");
            assert!(output.status.success(), "{output:?}");
            let _ = fs::remove_file(dir.path().join("out"));
        }
    }
}

#[test]
fn every_flip_is_found_or_harmless() {
    let dir = tempfile::tempdir().unwrap();
    let raw = tagged(3 << 12, 1);
    fs::write(dir.path().join("raw"), &raw).unwrap();
    succeed(&dir, &["create", "--from", "raw", "a"], b"");
    let layer = fs::read(dir.path().join("a")).unwrap();
    for at in (0..layer.len()).step_by(37) {
        if flipped(&dir, &layer, at).is_empty() {
            assert_reads(&dir, &["a"], &raw);
        }
    }
}

#[test]
fn a_writable_layer_over_another_image_is_found() {
    let dir = tempfile::tempdir().unwrap();
    for (number, name) in (1..).zip(["a", "b"]) {
        fs::write(dir.path().join("raw"), tagged(5120, number)).unwrap();
        succeed(&dir, &["create", "--from", "raw", name], b"");
    }
    let upper = "data=u.data,index=u.index";
    succeed(&dir, &["upper", "create", upper, "--parent", "a"], b"");
    let over = |layer| [layer, "--upper", upper];
    assert_eq!(check(&dir, &over("a")).0, 0);
    let lines = broken(&dir, &over("b"));
    assert_eq!(lines.len(), 1, "{lines:?}");
    let expected = "broken: the stack: u.data has parent ";
    assert!(lines[0].starts_with(expected), "{lines:?}");
    for verb in [
        &["inspect"][..],
        &["export", "-o", "out"],
        &["merge", "-o", "out"],
    ] {
        succeed(&dir, &[verb, &over("a")].concat(), b"");
        let args = [verb, &over("b")].concat();
        let error = fail(&dir, 1, &args);
        assert!(error.contains("u.data has parent"), "{error}");
        let output = ovbd(&dir, &[&args[..], &["--force"]].concat(), b"");
        assert!(output.status.success(), "{output:?}");
    }
}

/// A file of 64 GiB of which the trailer says that all is index: more than any layer has.
#[test]
fn an_index_that_is_refused_is_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let len = 64 << 30;
    let header = Header {
        index_offset: 8192,
        index_entries: (len - 12288) / 16,
        virtual_size: 1 << 20,
        uuid: Uuid::nil(),
        parent_uuid: Uuid::nil(),
        message: Vec::new(),
    };
    let path = dir.path().join("layer");
    let file = File::create(&path).unwrap();
    file.write_all_at(&header.encode(HeaderKind::Header), 0)
        .unwrap();
    let trailer = header.encode(HeaderKind::Trailer);
    file.write_all_at(&trailer, len - 4096).unwrap();
    let files = StackFiles {
        stack: Stack::new([path]),
        upper: None,
    };
    let progress = ProgressBar::hidden();
    let mut found = Vec::new();
    let files = files.open().unwrap();
    let outcome = tool::check::check(files, NonZero::<usize>::MIN, &progress, &mut |finding| {
        found.push(finding.to_string());
        Ok(())
    });
    assert_eq!(outcome.unwrap().broken, 1, "{found:?}");
    assert!(found[0].contains("index"), "{found:?}");
    assert_eq!(progress.length(), Some(0), "bytes to read");
}

/// A file of 64 GiB whose index, of entries that are refused, is at its start.
#[test]
fn what_follows_a_refused_index_is_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let len = 64 << 30;
    let header = Header {
        index_offset: 8192,
        index_entries: 256,
        ..Header::empty(1 << 20, Uuid::nil(), Uuid::nil())
    };
    let file = File::create(dir.path().join("layer")).unwrap();
    file.write_all_at(&header.encode(HeaderKind::Header), 0)
        .unwrap();
    let trailer = header.encode(HeaderKind::Trailer);
    file.write_all_at(&trailer, len - 4096).unwrap();
    let (outcome, length, _) = checked(&dir);
    assert_eq!((outcome.broken, length), (256, Some(0)));
}

/// A ZFile whose blocks are in a hole.
#[test]
fn broken_blocks_without_end_are_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let format = BlockFormat {
        algorithm: Algorithm::Lz4,
        block_size: 65536,
        checksum: true,
        dictionary_len: 0,
    };
    let stored = vec![100_000; 20_000];
    let table = zfile::encode_table(&stored);
    let totals = Totals {
        table_offset: 512 + 20_000 * 100_000,
        blocks: 20_000,
        original_size: 20_000 * 65536,
        table_crc: crc::raw(0, &table),
    };
    let file = File::create(dir.path().join("layer")).unwrap();
    let head = zfile::final_header(&format, &totals);
    file.write_all_at(&head, 0).unwrap();
    let end = [&table[..], &zfile::trailer(&format, &totals)].concat();
    file.write_all_at(&end, totals.table_offset).unwrap();
    let (outcome, _, found) = checked(&dir);
    assert!((1000..5000).contains(&outcome.broken), "{outcome}");
    let last = found.last().unwrap();
    assert!(last.contains("the rest of the layer was skipped"), "{last}");
}

/// Checks the file `layer`: what it came to, the bytes to be read, and what was found.
fn checked(dir: &TempDir) -> (tool::check::CheckSummary, Option<u64>, Vec<String>) {
    let files = StackFiles {
        stack: Stack::new([dir.path().join("layer")]),
        upper: None,
    };
    let progress = ProgressBar::hidden();
    let mut found = Vec::new();
    let files = files.open().unwrap();
    let outcome = tool::check::check(files, NonZero::<usize>::MIN, &progress, &mut |finding| {
        found.push(finding.to_string());
        Ok(())
    });
    (outcome.unwrap(), progress.length(), found)
}

/// As on a block device, which is longer.
#[test]
fn a_layer_sealed_in_place_may_be_followed_by_zeros() {
    let dir = tempfile::tempdir().unwrap();
    let golden = &golden::find("05b-raw-sealed").layers[0];
    let mut bytes = fs::read(golden).unwrap();
    fs::write(dir.path().join("sealed"), &bytes).unwrap();
    let expected = succeed(&dir, &["export", "sealed", "-o", "-"], b"");
    bytes.resize(bytes.len() + (5 << 20) + 512, 0);
    fs::write(dir.path().join("device"), &bytes).unwrap();
    let (code, lines) = check(&dir, &["device"]);
    assert_eq!(code, 0, "{lines:?}");
    assert_reads(&dir, &["device"], &expected);
}

/// Images whose layers have no names, as upstream's tools make them, are told apart by their identity.
#[test]
fn a_writable_layer_over_another_image_without_names_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let nil = Uuid::nil().to_string();
    for (len, name) in [(5120, "a"), (9216, "b")] {
        fs::write(dir.path().join("raw"), tagged(len, 1)).unwrap();
        succeed(
            &dir,
            &["create", "--from", "raw", "--uuid", &nil, name],
            b"",
        );
    }
    let upper = "data=u.data,index=u.index";
    succeed(&dir, &["upper", "create", upper, "--parent", "a"], b"");
    assert_eq!(check(&dir, &["a", "--upper", upper]).0, 0);
    let lines = broken(&dir, &["b", "--upper", upper]);
    let expected = "broken: the stack: u.data was made for a stack with identity ";
    assert!(lines[0].starts_with(expected), "{lines:?}");
    let error = fail(&dir, 1, &["merge", "b", "--upper", upper, "-o", "out"]);
    assert!(error.contains("--force"), "{error}");
    // The layer that it becomes keeps that, and one without such a record is accepted.
    succeed(&dir, &["seal", "--upper", upper], b"");
    assert_eq!(check(&dir, &["a", "u.data"]).0, 0);
    assert_eq!(broken(&dir, &["b", "u.data"]).len(), 1);
    let other = "data=v.data,index=v.index";
    succeed(&dir, &["upper", "create", other, "--size", "1M"], b"");
    assert_eq!(check(&dir, &["b", "--upper", other]).0, 0);
}
