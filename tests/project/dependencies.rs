//! What comes with the dependencies: licences, origins, duplicates.
//!
//! Known vulnerabilities are not looked up here: their database is not on crates.io
//! (`docs/security.md`).

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;

/// What may be distributed with an Apache-2.0 program, with no more to do than to name it.
const LICENCES: [&str; 8] = [
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "MIT",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Packages under another licence: the MPL asks for the package's own sources, which are used as
/// they are published.
const OTHERS: [(&str, &str); 1] = [("epoll", "MPL-2.0")];

/// Packages that the programs are built from in two versions.
const DUPLICATES: [&str; 5] = [
    "bitflags",      // 1 by vmm-sys-util
    "crypto-common", // as digest
    "digest",        // 0.10 by crc-fast, only its traits
    "getrandom",     // 0.2 by ring
    "syn",           // 2 by macros of landlock and others; not part of the programs
];

const CRATES_IO: &str = "registry+https://github.com/rust-lang/crates.io-index";

/// What `cargo metadata` says for one platform.
fn metadata(platform: &str) -> Value {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--locked", "--format-version", "1"])
        .args(["--filter-platform", platform])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().unwrap_or_default()
}

/// Packages used, by identifier; those of the tests too, or only those the programs are built from.
fn packages(metadata: &Value, tests: bool) -> BTreeMap<&str, &Value> {
    let nodes = metadata["resolve"]["nodes"].as_array().unwrap();
    let nodes: BTreeMap<_, _> = nodes.iter().map(|node| (text(node, "id"), node)).collect();
    let mut used = BTreeSet::new();
    let mut next = vec![text(&metadata["resolve"], "root")];
    while let Some(id) = next.pop() {
        if !used.insert(id) {
            continue;
        }
        for dependency in nodes[id]["deps"].as_array().unwrap() {
            let kinds = dependency["dep_kinds"].as_array().unwrap();
            if tests || kinds.iter().any(|kind| kind["kind"] != "dev") {
                next.push(text(dependency, "pkg"));
            }
        }
    }
    let all = metadata["packages"].as_array().unwrap();
    let used = all
        .iter()
        .filter(|package| used.contains(text(package, "id")));
    let used: BTreeMap<_, _> = used.map(|package| (text(package, "id"), package)).collect();
    assert!(used.len() > 50, "the list is read: {}", used.len());
    used
}

/// Whether an SPDX expression can be met by the licences for which `may` holds. `AND` binds closer
/// than `OR`; a slash is an old way to write `OR`.
fn is_met(expression: &str, may: &impl Fn(&str) -> bool) -> bool {
    let spaced = expression.replace('/', " OR ");
    let spaced = spaced.replace('(', " ( ").replace(')', " ) ");
    let words: Vec<_> = spaced.split_whitespace().collect();
    let mut rest = &words[..];
    let met = any(&mut rest, may);
    met && rest.is_empty()
}

fn any(words: &mut &[&str], may: &impl Fn(&str) -> bool) -> bool {
    let mut met = all(words, may);
    while let ["OR", rest @ ..] = *words {
        *words = rest;
        met |= all(words, may);
    }
    met
}

fn all(words: &mut &[&str], may: &impl Fn(&str) -> bool) -> bool {
    let mut met = one(words, may);
    while let ["AND", rest @ ..] = *words {
        *words = rest;
        met &= one(words, may);
    }
    met
}

fn one(words: &mut &[&str], may: &impl Fn(&str) -> bool) -> bool {
    match *words {
        ["(", rest @ ..] => {
            *words = rest;
            let met = any(words, may);
            let closed = words.first() == Some(&")");
            *words = words.get(1..).unwrap_or_default();
            met && closed
        }
        [name, "WITH", _, rest @ ..] | [name, rest @ ..] => {
            *words = rest;
            // An exception only permits more.
            may(name)
        }
        [] => false,
    }
}

fn for_each_platform(tests: bool, check: impl Fn(&Value) -> Option<String>) {
    for platform in ["x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"] {
        let metadata = metadata(platform);
        let packages = packages(&metadata, tests);
        let findings: Vec<_> = packages
            .values()
            .filter_map(|package| check(package))
            .collect();
        assert!(findings.is_empty(), "{platform}:\n{}", findings.join("\n"));
    }
}

#[test]
fn every_licence_is_one_of_the_list() {
    for_each_platform(true, |package| {
        let (name, licence) = (text(package, "name"), text(package, "license"));
        let may = |one: &str| LICENCES.contains(&one) || OTHERS.contains(&(name, one));
        (!is_met(licence, &may)).then(|| format!("{name}: {licence:?}"))
    });
}

#[test]
fn everything_comes_from_crates_io() {
    for_each_platform(true, |package| {
        let own = ["ovbd-vhost", "common"].contains(&text(package, "name"));
        let source = package["source"].as_str();
        let right = if own {
            source.is_none()
        } else {
            source == Some(CRATES_IO)
        };
        (!right).then(|| format!("{}: {source:?}", package["name"]))
    });
}

/// The fuzz targets have a lock file of their own, which `contrib/ci/fuzz` does not change.
#[test]
fn the_lock_file_of_the_fuzz_targets_knows_every_dependency() {
    let locked = include_str!("../fuzz/Cargo.lock");
    let metadata = metadata("x86_64-unknown-linux-gnu");
    let packages = metadata["packages"].as_array().unwrap();
    let own = packages
        .iter()
        .filter(|package| package["source"].is_null());
    let needed: BTreeSet<_> = own
        .flat_map(|package| package["dependencies"].as_array().unwrap())
        .filter(|dependency| dependency["kind"].is_null())
        .map(|dependency| text(dependency, "name"))
        .collect();
    assert!(needed.contains("fuser") && needed.contains("clap"));
    let missing: Vec<_> = needed
        .into_iter()
        .filter(|name| !locked.contains(&format!("name = \"{name}\"\n")))
        .collect();
    assert!(
        missing.is_empty(),
        "run `cargo update --workspace --manifest-path tests/fuzz/Cargo.toml`: {missing:?}"
    );
}

#[test]
fn the_programs_are_built_from_one_version_of_each() {
    let metadata = metadata("x86_64-unknown-linux-gnu");
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for package in packages(&metadata, false).values() {
        let versions = versions.entry(text(package, "name")).or_default();
        versions.push(text(package, "version"));
    }
    versions.retain(|_, versions| versions.len() > 1);
    let names: Vec<_> = versions.keys().copied().collect();
    assert_eq!(names, DUPLICATES, "{versions:?}");
}

#[test]
fn expressions_are_understood() {
    let may = |name: &str| LICENCES.contains(&name);
    for (expression, expected) in [
        ("MIT", true),
        ("GPL-3.0-only", false),
        ("GPL-2.0 OR MIT", true),
        ("GPL-2.0/MIT", true),
        ("GPL-2.0 AND MIT", false),
        ("MIT OR GPL-2.0 AND GPL-3.0", true),
        ("(MIT OR GPL-2.0) AND GPL-3.0", false),
        ("(MIT OR GPL-2.0) AND (GPL-3.0 OR Zlib)", true),
        ("Apache-2.0 WITH LLVM-exception", true),
        ("(MIT", false),
        ("MIT Zlib", false),
        ("", false),
    ] {
        assert_eq!(is_met(expression, &may), expected, "{expression:?}");
    }
}
