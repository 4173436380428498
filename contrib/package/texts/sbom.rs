//! The software bill of materials, in CycloneDX 1.5.

use std::error::Error;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::dependencies::{Dependencies, Package};

/// Writes the bill to `file`.
///
/// # Errors
/// The file cannot be written.
pub fn write(
    dependencies: &Dependencies,
    version: &str,
    time: &str,
    file: &Path,
) -> Result<(), Box<dyn Error>> {
    let own = format!("pkg:cargo/ovbd-vhost@{version}");
    let components: Vec<_> = dependencies.packages.iter().map(component).collect();
    let mut edges = vec![edge(&own, &dependencies.direct)];
    let packages = dependencies.packages.iter();
    edges.extend(
        packages.map(|package| edge(&purl(&package.name, &package.version), &package.uses)),
    );
    let bill = json!({
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "timestamp": time,
            "component": {
                "type": "application",
                "bom-ref": own,
                "name": "ovbd-vhost",
                "version": version,
                "purl": own,
                "licenses": [{ "expression": env!("CARGO_PKG_LICENSE") }],
            },
        },
        "components": components,
        "dependencies": edges,
    });
    fs::write(file, serde_json::to_string_pretty(&bill)? + "\n")?;
    Ok(())
}

fn component(package: &Package) -> Value {
    let purl = purl(&package.name, &package.version);
    json!({
        "type": "library",
        "bom-ref": purl,
        "name": package.name,
        "version": package.version,
        "description": package.description,
        "hashes": [{ "alg": "SHA-256", "content": package.checksum }],
        "licenses": [{ "expression": package.licence }],
        "purl": purl,
    })
}

fn edge(from: &str, to: &[(String, String)]) -> Value {
    let to: Vec<_> = to
        .iter()
        .map(|(name, version)| purl(name, version))
        .collect();
    json!({ "ref": from, "dependsOn": to })
}

/// Package URL of a package of crates.io.
fn purl(name: &str, version: &str) -> String {
    format!("pkg:cargo/{name}@{version}")
}
