//! Holds `src/` to the shape that `src/lib.rs` draws, by reading it as text.
//!
//! Comments, string contents and `#[cfg(test)]` items are blanked first (`code_of`); each rule then
//! looks at what is left and returns its findings as lines, which fail the test if there are any.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The only files that may hold `unsafe`, each small and with its reasons at the top.
const UNSAFE_FILES: [&str; 12] = [
    "cache/range_lock.rs",
    "codec.rs",
    "daemon/activation.rs",
    "daemon/sandbox/landlock.rs",
    "engine/uring.rs",
    "image/search.rs",
    "io/interrupt.rs",
    "io/mapping.rs",
    "io/prefetch.rs",
    "io/sigbus.rs",
    "io/vectored.rs",
    "source/resident_map.rs",
];

/// A file longer than this does more than one thing.
const MAX_LINES: usize = 500;

/// What stops the process, and has no place where a guest, a file or a front-end can reach.
const PANICS: [&str; 6] = [
    ".unwrap()",
    ".expect(",
    "panic!(",
    "unreachable!(",
    "todo!",
    "unimplemented!",
];

struct Source {
    /// Path below `src/`.
    name: String,
    text: String,
    /// `text` without comments, strings and tests; same line numbers.
    code: String,
}

fn sources() -> Vec<Source> {
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
                _ => without_tests(&code_of(&text)),
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

/// `text` with the insides of comments, strings and character literals turned into spaces.
fn code_of(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    while at < bytes.len() {
        let len = token_len(&bytes[at..], at.checked_sub(1).map(|before| bytes[before]));
        if len > 1 {
            let blank = |byte: &u8| if *byte == b'\n' { '\n' } else { ' ' };
            out.extend(bytes[at..at + len].iter().map(blank));
        } else {
            out.push(bytes[at] as char);
        }
        at += len;
    }
    out
}

/// Length of the comment or literal that starts `rest`, or 1 where none does.
fn token_len(rest: &[u8], before: Option<u8>) -> usize {
    let find = |needle: &[u8], from: usize| {
        let hit = rest[from..].windows(needle.len()).position(|w| w == needle);
        hit.map_or(rest.len(), |hit| from + hit + needle.len())
    };
    let in_word = before.is_some_and(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    match rest {
        [b'/', b'/', ..] => find(b"\n", 0).saturating_sub(1).max(2),
        [b'/', b'*', ..] => {
            let (mut depth, mut at) = (1, 2);
            while depth > 0 && at < rest.len() {
                match &rest[at..] {
                    [b'/', b'*', ..] => (depth, at) = (depth + 1, at + 2),
                    [b'*', b'/', ..] => (depth, at) = (depth - 1, at + 2),
                    _ => at += 1,
                }
            }
            at
        }
        [b'r', tail @ ..] if !in_word || before == Some(b'b') => {
            let hashes = tail.iter().take_while(|byte| **byte == b'#').count();
            if tail.get(hashes) != Some(&b'"') {
                return 1;
            }
            let close = [b"\"".as_slice(), &vec![b'#'; hashes]].concat();
            find(&close, hashes + 2)
        }
        [b'"', ..] => quoted_len(rest, b'"'),
        [b'\'', b'\\', ..] => quoted_len(rest, b'\''),
        // A character, not a lifetime: one character, then the closing quote.
        [b'\'', first, ..] => {
            let width = match first {
                0x00..=0x7f => 1,
                0xc0..=0xdf => 2,
                0xe0..=0xef => 3,
                _ => 4,
            };
            if rest.get(1 + width) == Some(&b'\'') {
                width + 2
            } else {
                1
            }
        }
        _ => 1,
    }
}

fn quoted_len(rest: &[u8], quote: u8) -> usize {
    let mut at = 1;
    while at < rest.len() && rest[at] != quote {
        at += if rest[at] == b'\\' { 2 } else { 1 };
    }
    (at + 1).min(rest.len())
}

/// `code` with the item after each `#[cfg(test)]` turned into spaces.
fn without_tests(code: &str) -> String {
    let mut out = code.to_owned();
    while let Some(start) = out.find("#[cfg(test)]") {
        let mut depth = 0;
        let mut end = out.len();
        for (at, char) in out[start..].char_indices() {
            match char {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            if depth == 0 && matches!(char, '}' | ';') {
                end = start + at + 1;
                break;
            }
        }
        let blank: String = out[start..end]
            .chars()
            .map(|char| if char == '\n' { '\n' } else { ' ' })
            .collect();
        out.replace_range(start..end, &blank);
    }
    out
}

/// Whether `word` stands in `code` as a whole word.
fn has_word(code: &str, word: &str) -> bool {
    code.split(|char: char| !char.is_alphanumeric() && char != '_')
        .any(|part| part == word)
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

fn fail_on(findings: Vec<String>) {
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
        .filter(|source| has_word(&source.code, "unsafe") || has_word(&source.code, "unsafe_code"))
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

#[test]
fn nothing_panics_outside_tests() {
    fail_on(
        sources()
            .iter()
            .flat_map(|source| {
                source
                    .code
                    .lines()
                    .enumerate()
                    .filter_map(|(number, line)| {
                        let found = PANICS.iter().find(|panic| line.contains(**panic))?;
                        Some(format!("src/{}:{}: {found}", source.name, number + 1))
                    })
            })
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
fn neither_a_guest_nor_a_front_end_can_flood_the_log() {
    let floors = ["engine/", "vhost/", "virtio/"];
    let sources = sources();
    let theirs = sources.iter().filter(|source| {
        let name = source.name.as_str();
        name != "engine/ratelimited_log.rs" && floors.iter().any(|floor| name.starts_with(floor))
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
    let text = r####"
        /* unsafe /* nested */ .unwrap() */ // panic!(
        let _ = ("unsafe \" .unwrap()", r#"a " panic!("#, b'"', '\'', '"', 'ü'); // 'x
        fn f<'a>(x: &'a str) { x.expect("no") }
        #[cfg(test)] mod tests { fn g() { h().unwrap() } }
        use crate::{units::{Sector, ByteOffset}, engine::x};
        use crate::image;
    "####;
    let code = without_tests(&code_of(text));
    assert_eq!(code.lines().count(), text.lines().count());
    for gone in ["unsafe", "unwrap", "panic", "ü", "'x"] {
        assert!(!code.contains(gone), "{gone} is left in: {code}");
    }
    assert!(code.contains("x.expect("), "code is kept: {code}");
    assert_eq!(modules_used(&code, "crate"), ["units", "engine", "image"]);

    let floors = floors(
        "//! | 2 | [`engine`] | . |\n//! | 1 | [`image`](mod@image) | . |\n//! | 0 | [`units`] | . |",
    );
    assert_eq!(floors.len(), 3);
    let breaches = floor_breaches("image/plan.rs", &code, &floors);
    assert_eq!(breaches.len(), 1, "{breaches:?}");
    assert!(breaches[0].contains("crate::engine"), "{breaches:?}");
    let escapes = |name| !floor_breaches(name, "use super::super::engine;", &floors).is_empty();
    assert!(escapes("image/mod.rs") && escapes("image/plan.rs") && !escapes("image/zfile/a.rs"));
    assert!(has_word("x unsafe {", "unsafe") && !has_word("unsafe_code", "unsafe"));
    let logging =
        "log::warn!()\n// log\nX.call_once(|| log::warn!());\n  ::log::error!()\nlimit::warn()";
    assert_eq!(unlimited_logging(logging), [1, 4]);
}
