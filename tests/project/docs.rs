//! Holds the pages of `docs/` and the README to the tree: what they name must exist.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Directories whose files the pages name, by a path from the root or by an end of it.
const NAMED: [&str; 5] = [".ci", "contrib", "docs", "src", "tests"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Paths of all files and directories below `dir`, from the root.
fn tree(dir: &Path, found: &mut HashSet<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        found.insert(path.strip_prefix(root()).unwrap().to_owned());
        if path.is_dir() && !path.ends_with("target") {
            tree(&path, found);
        }
    }
}

/// Words that are paths: of a Rust file, or below one of [`NAMED`].
fn paths_of(page: &str) -> Vec<&str> {
    let is_end = |char: char| char.is_whitespace() || "`()[],:;|\"'#".contains(char);
    let is_path = |word: &&str| {
        let first = word.split('/').next();
        let is_named = word.contains('/') && first.is_some_and(|first| NAMED.contains(&first));
        let is_plain = !word.contains(['*', '{', '<', '$']) && !word.starts_with("//");
        is_plain && (is_named || word.ends_with(".rs"))
    };
    let words = page
        .split(is_end)
        .map(|word| word.trim_end_matches(['.', '/']));
    words.filter(is_path).collect()
}

#[test]
fn paths_in_the_pages_exist() {
    let mut files = HashSet::new();
    for dir in NAMED {
        files.insert(dir.into());
        tree(&root().join(dir), &mut files);
    }
    let docs = fs::read_dir(root().join("docs")).unwrap();
    let docs = docs.map(|entry| entry.unwrap().path());
    let pages: Vec<_> = docs
        .filter(|path| path.extension().is_some_and(|ext| ext == "md"))
        .chain([root().join("README.md")])
        .collect();
    let mut seen = 0;
    let mut missing = Vec::new();
    for page in &pages {
        let text = fs::read_to_string(page).unwrap();
        for path in paths_of(&text) {
            seen += 1;
            if !files.iter().any(|file| file.ends_with(path)) {
                missing.push(format!("{}: {path}", page.display()));
            }
        }
    }
    assert!(seen > 100, "{seen} paths seen in {} pages", pages.len());
    assert!(missing.is_empty(), "\n{}", missing.join("\n"));
}
