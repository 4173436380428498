//! Files of `src/` do not use one another in circles: each can be read and changed with those below it
//! only. A module and the modules inside it are one thing, and may use each other.

use std::collections::{BTreeMap, BTreeSet};

use super::architecture::{Source, fail_on, sources};

/// Directories of which some files still use one another in circles.
const UNTANGLED_LATER: [&str; 5] = ["bin", "cache", "registry", "source", "writable"];

/// Path of a module below the crate's root.
type Module = Vec<String>;

/// The module of the file `name`: `a/b.rs` and `a/b/mod.rs` are both `a::b`.
fn module_of(name: &str) -> Module {
    let path = name.trim_end_matches(".rs").trim_end_matches("/mod");
    path.split('/').map(str::to_owned).collect()
}

/// Adds the paths of a tree such as `a::{b, c::d}` after `prefix` to `found`; returns the rest of `text`.
fn tree<'t>(text: &'t str, prefix: &[String], found: &mut BTreeSet<Module>) -> &'t str {
    if let Some(mut rest) = text.strip_prefix('{') {
        loop {
            rest = rest.trim_start_matches(|char: char| char.is_whitespace() || char == ',');
            if rest.is_empty() || rest.starts_with('}') {
                return rest.trim_start_matches('}');
            }
            let after = tree(rest, prefix, found);
            // A star, or what is no path.
            rest = match after.len() == rest.len() {
                true => rest.trim_start_matches(|char| char != ',' && char != '}'),
                false => after.trim_start_matches(|char| char != ',' && char != '}'),
            };
        }
    }
    let end = text.find(|char: char| !char.is_alphanumeric() && char != '_');
    let (word, rest) = text.split_at(end.unwrap_or(text.len()));
    if word.is_empty() {
        if text.starts_with('*') {
            found.insert(prefix.to_vec());
        }
        return text;
    }
    let path = [prefix, &[word.to_owned()]].concat();
    match rest.strip_prefix("::") {
        Some(rest) => tree(rest, &path, found),
        None => {
            found.insert(path);
            rest
        }
    }
}

/// The paths that the code of module `own` names by `crate::` or `super::`.
fn paths(code: &str, own: &[String]) -> BTreeSet<Module> {
    let mut found = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        tree(&code[at + "crate::".len()..], &[], &mut found);
    }
    for (at, _) in code.match_indices("super::") {
        if code[..at].ends_with("super::") {
            continue;
        }
        let (mut rest, mut base) = (&code[at..], own);
        while let Some(after) = rest.strip_prefix("super::") {
            rest = after;
            base = base.split_last().map_or(base, |(_, above)| above);
        }
        tree(rest, base, &mut found);
    }
    found
}

/// The files by module, and where the items are that their code passes on from inner modules (`pub use`).
struct Files<'f> {
    modules: BTreeMap<Module, &'f str>,
    passed_on: BTreeMap<Module, Module>,
}

impl<'f> Files<'f> {
    /// `files` are names and code.
    fn new(files: &[(&'f str, &str)]) -> Self {
        let (mut modules, mut passed_on) = (BTreeMap::new(), BTreeMap::new());
        for (name, code) in files {
            let own = module_of(name);
            for (at, found) in code.match_indices("pub use ") {
                let mut items = BTreeSet::new();
                tree(&code[at + found.len()..], &own, &mut items);
                for item in items {
                    let short = [own.as_slice(), &item[item.len() - 1..]].concat();
                    passed_on.entry(short).or_insert(item);
                }
            }
            modules.insert(own, *name);
        }
        Self { modules, passed_on }
    }

    /// The module that `path` leads to.
    fn module<'p>(&'p self, path: &'p Module) -> Option<&'p [String]> {
        let part = |path: &'p Module, is: &dyn Fn(&[String]) -> bool| {
            let parts = (1..=path.len()).rev().map(|len| &path[..len]);
            parts.into_iter().find(|part| is(part))
        };
        let item = part(path, &|part| self.passed_on.contains_key(part));
        let path = item.map_or(path, |item| &self.passed_on[item]);
        part(path, &|part| self.modules.contains_key(part))
    }
}

/// By file, the other files that it uses. `files` are names and code.
fn uses<'f>(files: &[(&'f str, &str)]) -> BTreeMap<&'f str, BTreeSet<&'f str>> {
    let all = Files::new(files);
    let used = |(name, code): &(&'f str, &str)| {
        let own = module_of(name);
        let paths = paths(code, &own);
        let used = paths.iter().filter_map(|path| {
            let module = all.module(path)?;
            let one_thing = module.starts_with(&own) || own.starts_with(module);
            (!one_thing).then(|| all.modules[module])
        });
        (*name, used.collect())
    };
    files.iter().map(used).collect()
}

/// A circle of files that begins and ends at `start`, if there is one.
fn circle<'f>(start: &'f str, uses: &BTreeMap<&'f str, BTreeSet<&'f str>>) -> Option<Vec<&'f str>> {
    let mut reached = BTreeMap::new();
    let mut left = vec![start];
    while let Some(file) = left.pop() {
        for used in uses.get(file).into_iter().flatten() {
            if *used == start {
                let mut circle = vec![start, file];
                while circle[circle.len() - 1] != start {
                    circle.push(reached[circle[circle.len() - 1]]);
                }
                circle.reverse();
                return Some(circle);
            }
            if !reached.contains_key(used) {
                reached.insert(*used, file);
                left.push(used);
            }
        }
    }
    None
}

fn circles(files: &[(&str, &str)]) -> Vec<String> {
    let uses = uses(files);
    let found = files.iter().filter_map(|(name, _)| circle(name, &uses));
    found.map(|circle| circle.join(" -> ")).collect()
}

#[test]
fn files_use_one_another_in_no_circle() {
    let sources = sources();
    let later = |source: &&Source| {
        let directory = source.name.split('/').next().unwrap();
        !UNTANGLED_LATER.contains(&directory) && source.name != "lib.rs"
    };
    let files: Vec<_> = sources
        .iter()
        .filter(later)
        .map(|source| (source.name.as_str(), source.code.as_str()))
        .collect();
    fail_on(circles(&files));
}

#[test]
fn circles_are_found() {
    let files = [
        ("a/mod.rs", "mod b;\nmod c;\nuse b::X;\npub use d::{V, W};"),
        ("a/b.rs", "use super::c::{self, Y};\nuse crate::low;"),
        ("a/c.rs", "use crate::{low, a::{\n    d::*,\n    Z,\n}};"),
        ("a/c/inner.rs", "use super::Y;\nuse super::super::b;"),
        ("a/d.rs", "fn f(x: super::Z) {}"),
        ("a/e.rs", "use super::W;"),
        ("low.rs", "use crate::a::V;"),
    ];
    let uses = uses(&files);
    assert_eq!(uses["a/b.rs"], BTreeSet::from(["a/c.rs", "low.rs"]));
    assert_eq!(uses["a/c.rs"], BTreeSet::from(["a/d.rs", "low.rs"]));
    assert_eq!(uses["a/c/inner.rs"], BTreeSet::from(["a/b.rs"]));
    assert_eq!(uses["a/e.rs"], BTreeSet::from(["a/d.rs"]));
    assert_eq!(uses["low.rs"], BTreeSet::from(["a/d.rs"]));
    assert!(circles(&files).is_empty());
    let more = [
        ("a/b.rs", files[1].1),
        ("a/c.rs", "use super::d;"),
        ("a/d.rs", "super::b::f()"),
    ];
    assert_eq!(circles(&more)[0], "a/b.rs -> a/c.rs -> a/d.rs -> a/b.rs");
}
