//! `ovbd merge`: what becomes of many layers.

use super::create::{Bare, bare};
use super::writable::UPPER;
use super::*;
use ovbd_vhost::format::lsmt::Mapping;

/// Mappings with neighbours joined, as far as a mapping can be long.
fn joined(mappings: &[Mapping]) -> Vec<(u64, u64, bool)> {
    let mut joined: Vec<(u64, u64, bool)> = Vec::new();
    for mapping in mappings {
        let (start, end) = (mapping.offset().0, mapping.end().0);
        match joined.last_mut() {
            Some(last) if last.1 == start && last.2 == mapping.is_zeroed() => last.1 = end,
            _ => joined.push((start, end, mapping.is_zeroed())),
        }
    }
    joined
}

/// As upstream merges the same layers: header, data and trailer byte for byte. Its index says the
/// same in more entries: it joins no neighbours that came from different layers.
#[test]
fn golden_merges() {
    let dir = tempfile::tempdir().unwrap();
    for (merged, from) in [
        ("11b-merge-2lowers", "10h-upper-empty"),
        ("11-merge-07s-ext4-3layer-small", "07s-ext4-3layer-small"),
    ] {
        let (merged, from) = (golden::find(merged), golden::find(from));
        let layers: Vec<_> = from
            .layers
            .iter()
            .map(|path| path.to_str().unwrap())
            .collect();
        let nil = "00000000-0000-0000-0000-000000000000";
        let args = ["merge", "-o", "out", "--uuid", nil];
        succeed(&dir, &[&args[..], &layers].concat(), b"");
        let Bare {
            bytes,
            header,
            trailer,
            mappings,
        } = bare(&dir.path().join("out"));
        let expected = bare(&merged.layers[0]);
        assert_eq!(header, expected.header);
        assert_eq!(trailer, expected.trailer);
        let data_end = trailer.index_offset as usize;
        assert!(bytes[..data_end] == expected.bytes[..data_end]);
        assert!(bytes[bytes.len() - 4096..] == expected.bytes[expected.bytes.len() - 4096..]);
        assert_eq!(joined(&mappings), joined(&expected.mappings));
        assert!(mappings.len() <= expected.mappings.len());
        let parameters = |path: &Path| fs::read(path).unwrap()[72..96].to_vec();
        assert_eq!(
            parameters(&dir.path().join("out")),
            parameters(&merged.layers[0])
        );
    }
}

#[test]
fn a_merged_layer_takes_the_place_of_its_parts() {
    let dir = tempfile::tempdir().unwrap();
    let disks: Vec<_> = [3 << 20, 4 << 20, (2 << 20) + 700, 5 << 20]
        .into_iter()
        .zip(0..)
        .map(|(len, seed)| disk(seed, len))
        .collect();
    let mut made = Vec::new();
    for (number, disk) in disks.iter().enumerate() {
        fs::write(dir.path().join("raw"), disk).unwrap();
        let name = format!("l{number}");
        let mut args = vec!["create", "--from", "raw", &name];
        let parent = made.join(",");
        if number > 0 {
            args.extend(["--parent", &parent]);
        }
        succeed(&dir, &args, b"");
        made.push(name);
    }
    for (first, last) in [(0, 0), (0, 1), (1, 2), (0, 2), (1, 3), (0, 3)] {
        let parts: Vec<_> = made[first..=last].iter().map(String::as_str).collect();
        for threads in ["1", "3"] {
            let args = ["merge", "-o", threads, "--threads", threads];
            succeed(&dir, &[&args[..], &parts].concat(), b"");
        }
        let merged = [1, 3].map(|n| fs::read(dir.path().join(n.to_string())).unwrap());
        assert!(merged[0] == merged[1], "the same for any number of threads");
        let mut stack: Vec<_> = made[..first].iter().map(String::as_str).collect();
        stack.push("3");
        assert_reads(&dir, &stack, &disks[last]);
        stack.extend(made[last + 1..].iter().map(String::as_str));
        assert_reads(&dir, &stack, &disks[3]);
        let (merged, bottom) = (
            bare(&dir.path().join("3")),
            bare(&dir.path().join(&made[first])),
        );
        assert_eq!(merged.header.parent_uuid, bottom.header.parent_uuid);
    }
}

/// A long chain becomes three layers, and the layers and the writable layer above stay its children.
#[test]
fn a_chain_of_fifty_layers_is_compacted_below_its_children() {
    let dir = tempfile::tempdir().unwrap();
    let mut disk = vec![0; 50 * 4096];
    let mut chain: Vec<String> = Vec::new();
    for number in 0..50 {
        disk[number * 4096..][..4096].copy_from_slice(&tagged(4096, number as u64));
        fs::write(dir.path().join("raw"), &disk).unwrap();
        let (name, below) = (format!("l{number}"), chain.join(","));
        let mut create = vec!["create", "--from", "raw", &name];
        if number > 0 {
            create.extend(["--parent", &below]);
        }
        succeed(&dir, &create, b"");
        chain.push(name);
    }
    let all = chain.join(",");
    succeed(&dir, &["upper", "create", UPPER, "--parent", &all], b"");
    let (first, middle, last) = ("l0", chain[1..49].join(","), "l49");
    succeed(&dir, &["merge", &middle, "-o", "middle"], b"");
    let short = [first, "middle", last];
    let with_upper = [&["check", "--strict"], &short[..], &["--upper", UPPER]].concat();
    succeed(&dir, &with_upper, b"");
    assert_reads(&dir, &short, &disk);
    // The top of the chain too: the writable layer stays the child of what replaces it.
    succeed(&dir, &["merge", "middle", last, "-o", "top"], b"");
    let short = [first, "top"];
    let with_upper = [&["check", "--strict"], &short[..], &["--upper", UPPER]].concat();
    succeed(&dir, &with_upper, b"");
    assert_reads(&dir, &short, &disk);
}
