//! `ovbd snapshot`: lists the snapshots of a disk, deletes one, or rolls the disk back to one.
//!
//! A deleted snapshot's layer is merged with the one above it, so that the disk and the other snapshots stay as they are.

use std::fmt;
use std::fs;
use std::num::NonZero;
use std::path::Path;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use indicatif::ProgressBar;
use serde::Serialize;
use serde_json::Value;
use uuid::Uuid;
use vm_memory::VolatileSlice;

use super::Error;
use super::loaded_stack::{Content, LoadedStack, WritableLayerReader};
use super::merge::{Merge, merge};
use super::open_files::StackFiles;
use super::output::Unnamed;
use super::table::{Align, Table, printable, seconds, size, span};
use crate::format::lsmt::Header;
use crate::image::Lineage;
use crate::image::config::Stack;
use crate::image::layer::Layer;
use crate::image::reader::Reader;
use crate::io::scatter::Scatter;
use crate::units::{SectorRange, Sectors};
use crate::writable::at_rest::{self, DiskAtRest, SnapshotFiles};
use crate::writable::{self, FlushRetries, MAX_STEP, Options, Paths, WritableLayer, create};

/// Sectors that are copied at a time: 1 MiB.
const STEP: Sectors = Sectors(2048);

/// The snapshots of a disk, oldest first.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub struct Listing(Vec<Row>);

#[derive(Debug, Serialize)]
struct Row {
    name: String,
    uuid: Uuid,
    /// Path of the layer's data file.
    layer: String,
    sealed: bool,
    /// Seconds since 1970.
    taken: Option<u64>,
    /// Storage of the layer.
    size_bytes: Option<u64>,
}

impl From<SnapshotFiles> for Row {
    fn from(files: SnapshotFiles) -> Self {
        Self {
            name: files.name,
            uuid: files.uuid,
            layer: files.paths.data.display().to_string(),
            sealed: files.sealed,
            taken: files.taken,
            size_bytes: files.size,
        }
    }
}

/// Lists the snapshots of the disk that was created with the pair `first`, in use or not.
///
/// # Errors
/// The manifest cannot be read.
pub fn list(first: &Paths) -> Result<Listing, Error> {
    let files = at_rest::list(first)?.into_iter();
    Ok(Listing(files.map(Row::from).collect()))
}

impl Listing {
    /// The snapshots in the answer of a daemon.
    pub fn from_answer(answer: &Value) -> Self {
        let rows = answer.as_array().into_iter().flatten().map(|snapshot| {
            let text = |key: &str| snapshot[key].as_str().unwrap_or_default().to_owned();
            let layer = text("layer");
            Row {
                name: text("name"),
                uuid: text("uuid").parse().unwrap_or_default(),
                sealed: snapshot["sealed"] == true,
                taken: snapshot["taken"].as_u64(),
                size_bytes: storage_of(&layer),
                layer,
            }
        });
        Self(rows.collect())
    }
}

fn storage_of(layer: &str) -> Option<u64> {
    use std::os::unix::fs::MetadataExt;
    let metadata = fs::metadata(layer).ok()?;
    metadata.blocks().checked_mul(512)
}

impl fmt::Display for Listing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.unwrap_or_default().as_secs();
        let mut table = Table::new([
            ("NAME", Align::Left),
            ("TAKEN", Align::Right),
            ("SIZE", Align::Right),
            ("STATE", Align::Left),
            ("UUID", Align::Left),
            ("LAYER", Align::Left),
        ]);
        for row in &self.0 {
            let absent = || "-".to_owned();
            let taken = row
                .taken
                .map(|taken| format!("{} ago", span(now.saturating_sub(taken))));
            table.add([
                row.name.clone(),
                taken.unwrap_or_else(absent),
                row.size_bytes.map_or_else(absent, size),
                if row.sealed { "sealed" } else { "unsealed" }.to_owned(),
                row.uuid.to_string(),
                row.layer.clone(),
            ]);
        }
        write!(f, "{table}")
    }
}

/// What a change did. Field names are those of the JSON.
#[derive(Debug, Serialize)]
pub struct Changed {
    /// The snapshot that the command names.
    snapshot: String,
    /// Whether the disk was rolled back to it; else it was deleted.
    rolled_back: bool,
    /// The snapshots that are gone.
    deleted: Vec<String>,
    /// Storage of the layer that has the data of a deleted snapshot.
    size_bytes: Option<u64>,
    seconds: f64,
}

impl fmt::Display for Changed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = printable(&self.snapshot);
        match self.rolled_back {
            true => write!(
                f,
                "rolled back to {name}; later snapshots deleted: {}",
                self.deleted.len()
            )?,
            false => write!(f, "deleted {name}")?,
        }
        if let Some(bytes) = self.size_bytes {
            write!(f, "; the layer above it has {} now", size(bytes))?;
        }
        writeln!(f, ", {}", seconds(self.seconds))
    }
}

/// Finds a snapshot by its name.
fn find(disk: &DiskAtRest, name: &str) -> Result<usize, Error> {
    let names = disk.names();
    let position = names.iter().position(|found| *found == name);
    position.ok_or_else(|| Error::NoSnapshot {
        name: name.to_owned(),
        names: names.into_iter().map(str::to_owned).collect(),
    })
}

/// Makes the disk that was created with the pair `first` what it was at a snapshot: drops what was written since. Later
/// snapshots are deleted, if `delete_newer` allows that.
///
/// # Errors
/// [`Error::NoSnapshot`], [`Error::NewerSnapshots`]; [`Error::Upper`] if the disk or a layer that would be removed is in
/// use, or a file cannot be changed.
pub fn roll_back(first: &Paths, name: &str, delete_newer: bool) -> Result<Changed, Error> {
    let start = Instant::now();
    let (disk, _active) = DiskAtRest::open(first)?;
    let position = find(&disk, name)?;
    let newer = disk.names().into_iter().skip(position + 1);
    let newer: Vec<_> = newer.map(str::to_owned).collect();
    if !newer.is_empty() && !delete_newer {
        let name = name.to_owned();
        return Err(Error::NewerSnapshots { name, newer });
    }
    disk.roll_back(position)?;
    Ok(Changed {
        snapshot: name.to_owned(),
        rolled_back: true,
        deleted: newer,
        size_bytes: None,
        seconds: start.elapsed().as_secs_f64(),
    })
}

/// Deletes a snapshot of the disk that was created with the pair `first`. The disk and its other snapshots keep their
/// content.
///
/// # Errors
/// [`Error::NoSnapshot`]; [`Error::Upper`] if the disk or a layer that would be removed is in use, or a file cannot be
/// changed; [`Error::Image`] if a layer cannot be read.
pub fn delete(
    first: &Paths,
    name: &str,
    threads: NonZero<usize>,
    bar: &ProgressBar,
) -> Result<Changed, Error> {
    let start = Instant::now();
    let (mut disk, active) = DiskAtRest::open(first)?;
    let position = find(&disk, name)?;
    // The layers that the merged one replaces.
    disk.refuse_in_use(position, 2)?;
    // At least the snapshot's layer, and the one above it unless that is the active one.
    disk.seal_up_to(position + 1)?;
    let below = disk.snapshot(position).into_iter();
    let paths = disk.reserve()?;
    let merged = match disk.snapshot(position + 1) {
        Some(next) => {
            let layers = below.chain([next]).map(|paths| paths.data);
            merge_sealed(Stack::new(layers), &paths.data, threads, bar)
        }
        None => {
            let layers = Stack::new(below.map(|paths| paths.data));
            let above = WritableLayerReader::of(&disk.active(), active)?;
            merge_active(layers, above, &paths, bar)
        }
    };
    // After an error, the next use of the disk removes what was written.
    merged?;
    disk.merge_into_next(position)?;
    Ok(Changed {
        snapshot: name.to_owned(),
        rolled_back: false,
        deleted: vec![name.to_owned()],
        size_bytes: storage_of(&paths.data.to_string_lossy()),
        seconds: start.elapsed().as_secs_f64(),
    })
}

/// The layers of a stack that may lack the layers below it.
fn load(stack: Stack) -> Result<LoadedStack, Error> {
    let stack = stack.with_lineage(Lineage::Checked.of_part());
    LoadedStack::load(StackFiles { stack, upper: None }.open()?)
}

/// Merges a snapshot's layer and the sealed layer above it to the sealed layer `target`.
fn merge_sealed(
    layers: Stack,
    target: &Path,
    threads: NonZero<usize>,
    bar: &ProgressBar,
) -> Result<(), Error> {
    let stack = load(layers)?;
    let task = Merge {
        blocks: None,
        tar: false,
        uuid: None,
        message: String::new(),
        threads,
    };
    let file = Unnamed::create_named(target)?;
    merge(&stack, &task, file.content(), bar)?;
    file.publish()
}

/// Merges a snapshot's layer and the active layer above it to a new writable layer.
fn merge_active(
    layers: Stack,
    above: WritableLayerReader,
    target: &Paths,
    bar: &ProgressBar,
) -> Result<(), Error> {
    let (image, kind) = (load(layers)?.into_image(), above.layer().kind());
    let bottom = image.iter().flat_map(|image| image.layers()).next();
    let bottom = bottom.map(Layer::trailer);
    let header = Header {
        index_offset: 0,
        index_entries: 0,
        parent_uuid: bottom.map_or_else(Uuid::nil, |bottom| bottom.parent_uuid),
        message: bottom
            .map(|bottom| bottom.message.clone())
            .unwrap_or_default(),
        ..above.layer().header().clone()
    };
    create(target, kind, &header)?;
    let layer = WritableLayer::open(target, None, &Options::default())?;
    let stack = LoadedStack::of(image, Some(above));
    bar.set_length(stack.size());
    let (mut reader, mut bytes) = (Reader::new(), Vec::new());
    for piece in stack.pieces() {
        let is_zero = piece.content == Content::Zeroed;
        for step in piece.range.steps(if is_zero { MAX_STEP } else { STEP }) {
            if is_zero {
                change(&layer, || layer.discard(step))?;
            } else {
                bytes.resize(step.len().bytes() as usize, 0);
                stack.read(&mut reader, step.start(), &mut bytes)?;
                change(&layer, || write(&layer, step, &mut bytes))?;
            }
            bar.set_position(step.end().byte());
        }
    }
    Ok(layer.flush()?)
}

fn write(
    layer: &WritableLayer,
    range: SectorRange,
    bytes: &mut [u8],
) -> Result<(), writable::Error> {
    let mut scatter = Scatter::new();
    scatter.push(VolatileSlice::from(bytes));
    layer.write(range, scatter.cursor(0))
}

/// Applies a change to a layer; repeats it after each flush that may help.
fn change(
    layer: &WritableLayer,
    mut apply: impl FnMut() -> Result<(), writable::Error>,
) -> Result<(), writable::Error> {
    let mut retries = FlushRetries::default();
    loop {
        match apply() {
            Err(error) if retries.allow(&error) => layer.flush()?,
            done => return done,
        }
    }
}
