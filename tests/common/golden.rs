//! The golden images: unpacked once into the build directory, described by their manifest.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use ovbd_vhost::writable::Paths;
use serde_json::Value;

use super::programs;

const ARCHIVE: &[u8] = include_bytes!("../data/golden.tar.zst");
const MANIFEST: &str = include_str!("../data/MANIFEST.json");

/// One case of the manifest.
#[derive(Clone, Debug)]
pub struct Case {
    /// Its name, which starts with a number as in `04-lz4-64k-crc`.
    pub name: String,
    /// Paths of the layers, bottom first.
    pub layers: Vec<PathBuf>,
    /// Whether the image has a writable layer as well.
    pub has_upper: bool,
    /// Size of the disk in bytes.
    pub size: u64,
    /// SHA-256 of the whole disk, in hexadecimal; of the undamaged one for a damaged image.
    pub sha256: String,
}

/// All cases, unpacked and ready to open.
pub fn cases() -> Vec<Case> {
    let manifest: Value = serde_json::from_str(MANIFEST).unwrap();
    let cases = manifest["cases"].as_array().unwrap();
    cases.iter().map(case).collect()
}

fn case(case: &Value) -> Case {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let layers = case["layers"].as_array().unwrap();
    Case {
        name: text(&case["name"]).unwrap(),
        layers: layers
            .iter()
            .map(|layer| path(layer["path"].as_str().unwrap()))
            .collect(),
        has_upper: !case["upper"].is_null(),
        size: case["vsize"].as_u64().unwrap(),
        sha256: text(&case["undamaged_raw_sha256"])
            .or(text(&case["raw_sha256"]))
            .unwrap(),
    }
}

/// The case of this name.
pub fn find(name: &str) -> Case {
    let mut cases = cases();
    cases.retain(|case| case.name == name);
    assert_eq!(cases.len(), 1, "case {name}");
    cases.remove(0)
}

/// The writable layer of a case that has one: data, possibly as a compressed archive, and index.
pub fn upper(case: &Case) -> Paths {
    let manifest: Value = serde_json::from_str(MANIFEST).unwrap();
    let cases = manifest["cases"].as_array().unwrap();
    let found = cases
        .iter()
        .find(|found| found["name"] == case.name.as_str());
    let upper = &found.unwrap()["upper"];
    Paths {
        data: path(upper["data"].as_str().unwrap()),
        index: path(upper["index"].as_str().unwrap()),
    }
}

/// A copy of a case's writable layer that may be written to; of a sparse file, with its holes.
pub fn copy_upper(case: &Case, folder: &Path) -> Paths {
    let upper = upper(case);
    let paths = Paths {
        data: folder.join("upper.data"),
        index: folder.join("upper.index"),
    };
    fs::copy(&upper.index, &paths.index).unwrap();
    if upper
        .data
        .extension()
        .is_some_and(|extension| extension == "zst")
    {
        let archive = zstd_decompress(&fs::read(&upper.data).unwrap());
        let tar = folder.join("upper.tar");
        fs::write(&tar, archive).unwrap();
        let mut command = Command::new("tar");
        let status = command.arg("-xSf").arg(&tar).arg("-C").arg(folder).status();
        assert!(status.unwrap().success());
        fs::remove_file(tar).unwrap();
        let name = upper.data.file_stem().unwrap();
        let name = Path::new(name).file_stem().unwrap();
        fs::rename(folder.join(name), &paths.data).unwrap();
    } else {
        fs::copy(&upper.data, &paths.data).unwrap();
    }
    paths
}

fn zstd_decompress(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(256 << 20);
    zstd_safe::decompress(&mut out, bytes).unwrap();
    out
}

/// Path of an unpacked file of the archive.
pub fn path(name: &str) -> PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(unpack).join(name)
}

/// Unpacks the archive unless an earlier run did; test binaries may race for it.
fn unpack() -> PathBuf {
    let build = programs::temporary();
    let folder = build.join(format!(
        "golden-{:08x}",
        ovbd_vhost::format::crc::raw(!0, ARCHIVE)
    ));
    if folder.exists() {
        return folder;
    }
    let fresh = tempfile::tempdir_in(&build).unwrap();
    let len = zstd_safe::get_frame_content_size(ARCHIVE).unwrap().unwrap();
    let mut tar = vec![0; usize::try_from(len).unwrap()];
    assert_eq!(zstd_safe::decompress(&mut tar[..], ARCHIVE), Ok(tar.len()));
    let mut rest = &tar[..];
    while rest[0] != 0 {
        let (header, after) = rest.split_at(512);
        let name = std::str::from_utf8(&header[..100]).unwrap();
        let size = std::str::from_utf8(&header[124..135]).unwrap();
        let size = usize::from_str_radix(size, 8).unwrap();
        let target = fresh.path().join(name.trim_end_matches('\0'));
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        fs::write(target, &after[..size]).unwrap();
        rest = &after[size.next_multiple_of(512)..];
    }
    // The process that comes second finds the same files already there.
    if fs::rename(fresh.path(), &folder).is_ok() {
        let _ = fresh.keep();
    }
    folder
}
