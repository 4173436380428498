//! The licences of everything that the programs are built from, in one file.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::dependencies::{Dependencies, Package};

/// How names of licence files start, in capitals.
const NAMES: [&str; 6] = [
    "LICENSE",
    "LICENCE",
    "COPYING",
    "COPYRIGHT",
    "NOTICE",
    "UNLICENSE",
];

/// Directories below a package that hold no licence of what is built.
const SKIPPED: [&str; 5] = ["tests", "benches", "examples", "fuzz", "target"];

/// Depth below a package at which bundled C libraries have their licences.
const DEPTH: usize = 2;

/// Writes the list of packages, then each licence text once with the packages that it is of.
///
/// # Errors
/// A licence cannot be read, or the file cannot be written.
pub fn write(dependencies: &Dependencies, file: &Path) -> Result<(), Box<dyn Error>> {
    let mut out = String::from("ovbd-vhost is built from the following packages.\n\n");
    let mut texts: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for package in &dependencies.packages {
        writeln!(
            out,
            "{} {}: {}",
            package.name, package.version, package.licence
        )?;
        let paths = licence_files(&package.dir, DEPTH)?;
        if paths.is_empty() {
            writeln!(
                out,
                "    no licence file; see https://crates.io/crates/{}",
                package.name
            )?;
        }
        add(&mut texts, package, paths)?;
    }
    writeln!(out, "The Rust standard library: MIT OR Apache-2.0")?;
    for name in ["Apache-2.0.txt", "MIT.txt"] {
        let text = fs::read_to_string(rust_licences()?.join(name))?;
        let owners = texts.entry(text).or_default();
        owners.push("the Rust standard library".to_owned());
    }
    for (text, owners) in texts {
        let line = "-".repeat(80);
        writeln!(
            out,
            "\n{line}\n{}\n{line}\n{}",
            owners.join(", "),
            text.trim_end()
        )?;
    }
    fs::write(file, out)?;
    Ok(())
}

/// Adds the licences at `paths` to those known.
fn add(
    texts: &mut BTreeMap<String, Vec<String>>,
    package: &Package,
    paths: Vec<PathBuf>,
) -> Result<(), Box<dyn Error>> {
    for path in paths {
        let text = String::from_utf8_lossy(&fs::read(&path)?).replace('\r', "");
        let inside = path.strip_prefix(&package.dir)?;
        let owner = match inside.parent() {
            Some(dir) if dir != Path::new("") => format!("{} ({})", package.name, dir.display()),
            _ => package.name.clone(),
        };
        let owners = texts.entry(text).or_default();
        if !owners.contains(&owner) {
            owners.push(owner);
        }
    }
    Ok(())
}

/// Licence files in `dir` and in its directories up to `depth` below, in the order of their names.
fn licence_files(dir: &Path, depth: usize) -> Result<Vec<PathBuf>, Box<dyn Error>> {
    let mut paths: Vec<_> = fs::read_dir(dir)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()?;
    paths.sort();
    let mut found = Vec::new();
    for path in paths {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .to_uppercase();
        let is_licence = NAMES.iter().any(|start| name.starts_with(start));
        if path.is_dir() {
            let is_skipped = SKIPPED.iter().any(|skipped| path.ends_with(skipped));
            if depth > 0 && !is_skipped {
                found.extend(licence_files(&path, depth - 1)?);
            }
        } else if is_licence && !name.ends_with(".RS") {
            found.push(path);
        }
    }
    Ok(found)
}

/// Directory of the licences of the Rust toolchain.
fn rust_licences() -> Result<PathBuf, Box<dyn Error>> {
    let output = Command::new("rustc")
        .args(["--print", "sysroot"])
        .output()?;
    let sysroot = PathBuf::from(String::from_utf8(output.stdout)?.trim_end());
    Ok(sysroot.join("share/doc/rust/licenses"))
}
