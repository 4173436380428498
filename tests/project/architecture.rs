//! Holds `src/` to the shape that `src/lib.rs` draws, by reading it as text.
//!
//! Each rule looks at the lines without comments and unit tests (`code_of`) and returns its findings
//! as lines, which fail the test if there are any. Clippy denies panics (`src/lib.rs`).

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The only files that may allow themselves `unsafe`, which is denied elsewhere; each is small and has
/// its reasons at the top.
const UNSAFE_FILES: &[&str] = &[
    "bin/ovbd/confined.rs",
    "cache/range_lock.rs",
    "codec.rs",
    "daemon/activation.rs",
    "engine/ring.rs",
    "image/search.rs",
    "io/bitmap.rs",
    "io/child_status.rs",
    "io/confine/landlock.rs",
    "io/heap.rs",
    "io/interrupt.rs",
    "io/lease.rs",
    "io/mapped_file.rs",
    "io/name_service.rs",
    "io/peer.rs",
    "io/prefetch.rs",
    "io/section.rs",
    "io/sigbus.rs",
    "io/signal_event.rs",
    "io/vectored.rs",
    "source/resident_map.rs",
];

/// A file longer than this does more than one thing.
const MAX_LINES: usize = 500;

pub struct Source {
    /// Path below `src/`.
    pub name: String,
    text: String,
    /// `text` without comments and unit tests; same line numbers.
    pub code: String,
}

pub fn sources() -> Vec<Source> {
    fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|ext| ext == "rs") {
                found.push(path);
            }
        }
    }
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut paths = Vec::new();
    walk(&src, &mut paths);
    paths.sort();
    let sources: Vec<_> = paths
        .iter()
        .map(|path| {
            let text = fs::read_to_string(path).unwrap();
            let name = path.strip_prefix(&src).unwrap().to_str().unwrap();
            let code = match path.file_stem().and_then(|stem| stem.to_str()) {
                Some("tests") => String::new(),
                _ => code_of(&text),
            };
            Source {
                name: name.to_owned(),
                text,
                code,
            }
        })
        .collect();
    assert!(sources.iter().any(|source| source.name == "lib.rs"));
    sources
}

/// `text` up to its unit tests, each line up to its comment. A string with `//` in it loses its end.
fn code_of(text: &str) -> String {
    let code = text
        .split("#[cfg(test)]\nmod tests {")
        .next()
        .unwrap_or(text);
    let lines = code
        .lines()
        .map(|line| line.split("//").next().unwrap_or(line));
    lines.flat_map(|line| [line, "\n"]).collect()
}

/// Top-level modules named by paths through `root` (`crate::a::b`, `crate::{a::b, c}`).
fn modules_used(code: &str, root: &str) -> Vec<String> {
    let word_len = |text: &str| {
        text.find(|char: char| !char.is_alphanumeric() && char != '_')
            .unwrap_or(text.len())
    };
    let mut used = Vec::new();
    for (at, _) in code.match_indices(&format!("{root}::")) {
        let rest = &code[at + root.len() + 2..];
        let Some(group) = rest.strip_prefix('{') else {
            used.push(rest[..word_len(rest)].to_owned());
            continue;
        };
        let mut depth = 0;
        let mut starts_path = true;
        for (at, char) in group.char_indices() {
            match char {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => starts_path = true,
                char if char.is_whitespace() => {}
                _ if starts_path => {
                    used.push(group[at..at + word_len(&group[at..])].to_owned());
                    starts_path = false;
                }
                _ => {}
            }
        }
    }
    used
}

/// Where a module stands: modules of one row are one thing and may use each other.
#[derive(Clone, Copy)]
struct Place {
    floor: u32,
    row: usize,
}

/// Module to place, from the table in the crate's documentation.
fn floors(lib: &str) -> BTreeMap<String, Place> {
    let mut floors = BTreeMap::new();
    for (row, line) in lib.lines().enumerate() {
        let cells: Vec<_> = line.split('|').map(str::trim).collect();
        let ["//!", floor, modules, ..] = cells[..] else {
            continue;
        };
        let Ok(floor) = floor.parse() else { continue };
        for module in modules.split("[`").skip(1) {
            let name = module.split('`').next().unwrap();
            floors.insert(name.to_owned(), Place { floor, row });
        }
    }
    floors
}

fn floor_breaches(name: &str, code: &str, floors: &BTreeMap<String, Place>) -> Vec<String> {
    let own = name.split(['/', '.']).next().unwrap();
    let mut breaches = Vec::new();
    for module in modules_used(code, "crate") {
        let holds = match (floors.get(&module), floors.get(own)) {
            (Some(used), Some(own)) => used.floor < own.floor || used.row == own.row,
            _ => false,
        };
        if !holds {
            breaches.push(format!(
                "src/{name}: uses crate::{module}, not a floor below {own}"
            ));
        }
    }
    // `super` past the own module would be a way around the rule.
    let depth = name.matches('/').count() + 1 - usize::from(name.ends_with("/mod.rs"));
    if code.contains(&"super::".repeat(depth)) {
        breaches.push(format!("src/{name}: leaves {own} through super::"));
    }
    breaches
}

/// Directories whose modules are in an order, from the table in the documentation of their `mod.rs`: a
/// module uses only those below it.
const ORDERED: &[&str] = &[
    "fetch",
    "node",
    "registry",
    "tool",
    "tool/check",
    "writable",
];

/// The modules of a table, the uppermost first.
fn rows(doc: &str) -> Vec<String> {
    let row = |line: &str| {
        let rest = line.strip_prefix("//! | [`")?;
        rest.split('`').next().map(str::to_owned)
    };
    doc.lines().filter_map(row).collect()
}

/// The module that each name comes from that a `mod.rs` gives out (`pub use module::{Name, Other};`).
fn given_out(code: &str) -> BTreeMap<String, String> {
    let mut origins = BTreeMap::new();
    let uses = code.split("pub use ").skip(1);
    for path in uses.filter_map(|rest| rest.split(';').next()) {
        let Some((module, _)) = path.split_once("::") else {
            continue;
        };
        let names = path.split(|char: char| !char.is_alphanumeric() && char != '_');
        for name in names.filter(|name| !name.is_empty() && *name != module) {
            origins.insert(name.to_owned(), module.to_owned());
        }
    }
    origins
}

/// Uses of modules of `directory` that are not below the one that `name` belongs to.
fn order_breaches(
    directory: &str,
    name: &str,
    code: &str,
    rows: &[String],
    origins: &BTreeMap<String, String>,
) -> Vec<String> {
    let inner = &name[directory.len() + 1..];
    let own = inner.split(['/', '.']).next().unwrap();
    let place = |module: &str| rows.iter().position(|row| row == module);
    // In `a/mod.rs` and `a/b.rs`, `super` is `a` or above it by as many levels.
    let depth = inner.matches('/').count() + 1 - usize::from(inner.ends_with("/mod.rs"));
    let root = vec!["super"; depth].join("::");
    let code = &code.replace(&format!("{root}::super::"), "outside::");
    let mut used = modules_used(code, &root);
    let full = format!("crate::{}", directory.replace('/', "::"));
    used.extend(modules_used(code, &full));
    let origin = |name: String| match rows.contains(&name) {
        true => name,
        false => origins.get(&name).cloned().unwrap_or(name),
    };
    let is_above = |module: &String| match (place(own), place(module)) {
        (Some(own), Some(used)) => used < own,
        _ => true,
    };
    let breach = |module| format!("src/{name}: uses {module}, which is not below {own}");
    used.into_iter()
        .map(origin)
        .filter(|module| module != own && module != "crate")
        .filter(is_above)
        .map(breach)
        .collect()
}

#[test]
fn modules_of_an_ordered_directory_use_those_below_only() {
    let sources = sources();
    let mut findings = Vec::new();
    for directory in ORDERED {
        let root = format!("{directory}/mod.rs");
        let root = sources.iter().find(|source| source.name == root).unwrap();
        let rows = rows(&root.text);
        let declared = root.code.lines().filter_map(|line| {
            line.trim_start_matches("pub ")
                .strip_prefix("mod ")?
                .strip_suffix(';')
        });
        let mut declared: Vec<_> = declared.filter(|module| *module != "tests").collect();
        let origins = given_out(&root.code);
        declared.sort_unstable();
        let mut listed: Vec<_> = rows.iter().map(String::as_str).collect();
        listed.sort_unstable();
        assert_eq!(
            declared, listed,
            "the table in src/{directory}/mod.rs lists each module once"
        );
        let prefix = format!("{directory}/");
        let inside = sources.iter().filter(|source| {
            source.name.starts_with(&prefix)
                && source.name != root.name
                && !source.name.contains("/tests")
        });
        findings.extend(inside.flat_map(|source| {
            order_breaches(directory, &source.name, &source.code, &rows, &origins)
        }));
    }
    fail_on(findings);
}

pub fn fail_on(findings: Vec<String>) {
    assert!(findings.is_empty(), "\n{}\n", findings.join("\n"));
}

#[test]
fn a_module_uses_only_floors_below_its_own() {
    let sources = sources();
    let lib = sources
        .iter()
        .find(|source| source.name == "lib.rs")
        .unwrap();
    let floors = floors(&lib.text);
    let declared: Vec<_> = lib
        .code
        .lines()
        .filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';'))
        .collect();
    assert_eq!(
        declared,
        floors.keys().map(String::as_str).collect::<Vec<_>>(),
        "the table in src/lib.rs lists each module once"
    );
    let inside = |source: &&Source| source.name != "lib.rs" && !source.name.starts_with("bin/");
    fail_on(
        sources
            .iter()
            .filter(inside)
            .flat_map(|source| floor_breaches(&source.name, &source.code, &floors))
            .collect(),
    );
}

#[test]
fn unsafe_stands_in_the_listed_files_and_no_other() {
    let holding: Vec<_> = sources()
        .into_iter()
        .filter(|source| source.code.contains("(unsafe_code"))
        .map(|source| source.name)
        .collect();
    assert_eq!(holding, UNSAFE_FILES);
}

#[test]
fn every_file_says_what_it_is_for_and_is_short() {
    fail_on(
        sources()
            .iter()
            .flat_map(|source| {
                let lines = source.text.lines().count();
                let long = lines > MAX_LINES;
                let mute = !source.text.starts_with("//! ");
                [
                    long.then(|| format!("src/{}: {lines} lines", source.name)),
                    mute.then(|| format!("src/{}: no module documentation", source.name)),
                ]
            })
            .flatten()
            .collect(),
    );
}

/// The lines of `code` that log without a limit, numbered from 1. Those of which a process writes
/// one are none of them.
fn unlimited_logging(code: &str) -> Vec<usize> {
    let loud = ["log::info!", "log::warn!", "log::error!"];
    let lines = code.lines().zip(1..);
    lines
        .filter(|(line, _)| !line.contains("call_once("))
        .filter(|(line, _)| loud.iter().any(|name| line.contains(name)))
        .map(|(_, number)| number)
        .collect()
}

#[test]
fn no_party_can_flood_the_log() {
    let floors = [
        "cache/",
        "engine/",
        "fetch/",
        "image/tables",
        "registry/",
        "source/",
        "vhost/",
        "virtio/",
        "writable/",
    ];
    // They log at the start of a process.
    let starts = [
        "fetch/process/mod.rs",
        "fetch/sandbox.rs",
        "registry/service_config.rs",
    ];
    let sources = sources();
    let theirs = sources.iter().filter(|source| {
        let name = source.name.as_str();
        !starts.contains(&name) && floors.iter().any(|floor| name.starts_with(floor))
    });
    fail_on(
        theirs
            .flat_map(|source| {
                let found = unlimited_logging(&source.code).into_iter();
                found.map(|line| format!("src/{}:{line}: not by way of limit", source.name))
            })
            .collect(),
    );
}

#[test]
fn the_rules_see_what_they_should() {
    let text = "//! crate::node\nuse crate::{units::{Sector, Sectors}, engine::x}; // crate::io\n\
        use crate::image;\n#[cfg(test)]\nmod tests {\n    use crate::daemon;\n}\n";
    let code = code_of(text);
    assert_eq!(modules_used(&code, "crate"), ["units", "engine", "image"]);

    let floors = floors(
        "//! | 2 | [`engine`] | . |\n//! | 1 | [`image`](mod@image) | . |\n//! | 0 | [`units`] | . |",
    );
    assert_eq!(floors.len(), 3);
    let breaches = floor_breaches("image/pieces.rs", &code, &floors);
    assert_eq!(breaches.len(), 1, "{breaches:?}");
    assert!(breaches[0].contains("crate::engine"), "{breaches:?}");
    let escapes = |name| !floor_breaches(name, "use super::super::engine;", &floors).is_empty();
    assert!(escapes("image/mod.rs") && escapes("image/pieces.rs") && !escapes("image/zfile/a.rs"));
    let rows = rows("//! | [`top`] | . |\n//! | [`middle`] | . |\n//! text\n//! | [`low`] | . |");
    assert_eq!(rows, ["top", "middle", "low"]);
    let origins = given_out(
        "pub use top::Upper;\npub use low::{Lower, x as y};\npub use crate::units::Sector;",
    );
    let order = |name: &str, code: &str| order_breaches("d", name, code, &rows, &origins).len();
    assert_eq!(order("d/middle.rs", "use super::{Lower, Sector, y};"), 0);
    assert_eq!(order("d/middle.rs", "use super::{Lower, Upper};"), 1);
    assert_eq!(order("d/middle.rs", "use super::{low, top};"), 1);
    assert_eq!(
        order("d/middle.rs", "use super::low; use crate::d::top;"),
        1
    );
    assert_eq!(order("d/middle.rs", "use super::Reexported;"), 1);
    assert_eq!(
        order("d/middle/mod.rs", "use super::low; use message::X;"),
        0
    );
    assert_eq!(
        order(
            "d/middle/part.rs",
            "use super::X; use super::super::low::Y;"
        ),
        0
    );
    assert_eq!(order("d/middle/part.rs", "use super::super::top::Y;"), 1);

    let logging =
        "log::warn!()\n// log\nX.call_once(|| log::warn!());\n  ::log::error!()\nlimit::warn()";
    assert_eq!(unlimited_logging(logging), [1, 4]);
}
