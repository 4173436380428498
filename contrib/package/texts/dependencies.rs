//! The packages that the programs are built from, as Cargo resolves them.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use super::root;

/// A package of crates.io.
pub struct Package {
    /// Name of the package.
    pub name: String,
    /// Version of the package.
    pub version: String,
    /// Licence, as an SPDX expression.
    pub licence: String,
    /// One line about the package.
    pub description: String,
    /// SHA-256 of the archive on crates.io.
    pub checksum: String,
    /// Directory of the unpacked sources.
    pub dir: PathBuf,
    /// Packages that it is built from, as name and version.
    pub uses: Vec<(String, String)>,
}

/// Everything that the programs are built from.
pub struct Dependencies {
    /// Packages in the order of their names and versions.
    pub packages: Vec<Package>,
    /// Packages that this project itself names.
    pub direct: Vec<(String, String)>,
}

impl Dependencies {
    /// Asks Cargo. Packages of tests and benchmarks are left out.
    ///
    /// # Errors
    /// Cargo fails, or prints something unexpected.
    pub fn read() -> Result<Self, Box<dyn Error>> {
        let metadata = metadata()?;
        let nodes = list(&metadata["resolve"]["nodes"]);
        let nodes: BTreeMap<_, _> = nodes.iter().map(|node| (text(node, "id"), node)).collect();
        let top = text(&metadata["resolve"], "root");
        let mut used = BTreeSet::new();
        let mut next = vec![top];
        while let Some(id) = next.pop() {
            if used.insert(id) {
                next.extend(uses(nodes[id]));
            }
        }
        used.remove(top);

        let packages = list(&metadata["packages"]);
        let known: BTreeMap<_, _> = packages.iter().map(|one| (text(one, "id"), one)).collect();
        let label = |id: &str| {
            let package = known[id];
            (
                text(package, "name").to_owned(),
                text(package, "version").to_owned(),
            )
        };
        let checksums = checksums()?;
        let package = |id: &str| {
            let (name, version) = label(id);
            let package = known[id];
            let manifest = Path::new(text(package, "manifest_path"));
            Package {
                licence: text(package, "license").replace('/', " OR "),
                description: text(package, "description")
                    .split_whitespace()
                    .collect::<Vec<_>>()
                    .join(" "),
                checksum: checksums
                    .get(&(name.clone(), version.clone()))
                    .cloned()
                    .unwrap_or_default(),
                dir: manifest.parent().unwrap_or(manifest).to_owned(),
                uses: uses(nodes[id]).map(label).collect(),
                name,
                version,
            }
        };
        let mut packages: Vec<_> = used.iter().map(|id| package(id)).collect();
        packages.sort_by(|a, b| (&a.name, &a.version).cmp(&(&b.name, &b.version)));
        let direct = uses(nodes[top]).map(label).collect();
        Ok(Self { packages, direct })
    }
}

/// The output of `cargo metadata` for the platform of this program.
fn metadata() -> Result<Value, Box<dyn Error>> {
    let platform = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let output = Command::new("cargo")
        .args([
            "metadata",
            "--locked",
            "--format-version",
            "1",
            "--filter-platform",
            &platform,
        ])
        .current_dir(root())
        .output()?;
    if !output.status.success() {
        return Err(format!(
            "cargo metadata: {}",
            String::from_utf8_lossy(&output.stderr)
        )
        .into());
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Checksums of `Cargo.lock`, by name and version.
fn checksums() -> Result<BTreeMap<(String, String), String>, Box<dyn Error>> {
    let lock = fs::read_to_string(root().join("Cargo.lock"))?;
    let value = |entry: &str, key: &str| {
        let start = format!("{key} = \"");
        let line = entry
            .lines()
            .find_map(|line| line.strip_prefix(start.as_str()));
        line.map(|line| line.trim_end_matches('"').to_owned())
    };
    let entries = lock.split("[[package]]").skip(1);
    let entries = entries.filter_map(|entry| {
        let label = (value(entry, "name")?, value(entry, "version")?);
        Some((label, value(entry, "checksum")?))
    });
    Ok(entries.collect())
}

/// Identifiers of the packages that a package is built from.
fn uses(node: &Value) -> impl Iterator<Item = &str> {
    let built = list(&node["deps"]).iter().filter(|dependency| {
        let kinds = list(&dependency["dep_kinds"]);
        kinds.iter().any(|kind| kind["kind"] != "dev")
    });
    built.map(|dependency| text(dependency, "pkg"))
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().unwrap_or_default()
}
