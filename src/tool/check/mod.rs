//! `ovbd check`: verifies every checksum, block and mapping of every layer of a stack.
//!
//! The caller gets each finding at once. In the end the stack is loaded as the daemon does it, so
//! that a checked stack is never refused there. A module uses only modules below it in this table.
//!
//! | module | content |
//! |---|---|
//! | [`blocks`] | reads and decodes all blocks of a layer, on many threads |
//! | [`layout`] | header, trailer and index of a layer |
//! | [`container`] | wrappers of a layer (tar, ZFile); continues after damage where possible |
//! | [`digest`] | digest of a layer in a registry |
//! | [`upper`] | a writable layer |
//! | [`summary`] | numbers of findings |
//! | [`findings`] | collects what is wrong |

use std::num::NonZero;
use std::sync::Arc;

use indicatif::ProgressBar;

use super::Error;
use super::open_files::{OpenFiles, OpenLayer};
use crate::image::layer::Layer;
use crate::image::lineage::Placed;
use crate::image::{self, Image, Lineage};
use crate::source::{Blob, LayerRef};
use crate::writable::load::waits_for_seal;

mod blocks;
mod container;
mod digest;
mod findings;
mod layout;
mod summary;
mod upper;

use findings::Findings;

pub use findings::{Finding, FindingKind};
pub use summary::{CheckSummary, Report};

/// Most layers of an image that upstream opens.
const UPSTREAM_LAYERS: usize = 255;

/// Checks all layers, the writable layer, and the stack. `tell` gets each finding at once; an error
/// of `tell` ends the check.
///
/// # Errors
/// Those of `tell`; [`Error::Threads`]; the list of snapshots cannot be read. Everything wrong with
/// a layer is a finding.
pub fn check(
    mut files: OpenFiles,
    threads: NonZero<usize>,
    progress: &ProgressBar,
    tell: &mut dyn FnMut(&Finding) -> Result<(), Error>,
) -> Result<CheckSummary, Error> {
    let mut writable = Vec::new();
    if let Some(pairs) = files.pairs()? {
        let frozen = pairs.frozen();
        // Those above a layer that waits to be sealed are sealed after it.
        let first = frozen.iter().position(waits_for_seal);
        let (sealed, waiting) = frozen.split_at(first.unwrap_or(frozen.len()));
        files.add_frozen(sealed);
        writable.extend(
            waiting
                .iter()
                .map(|pair| (pair.clone(), upper::State::Frozen)),
        );
        writable.push((pairs.active().clone(), upper::State::Active));
    }
    let mut summary = CheckSummary::default();
    files.start_reading();
    for layer in files.layers() {
        let mut findings = Findings::new(Some(layer.name.clone()), tell);
        summary.blocks += check_layer(layer, threads, progress, &mut findings)?;
        summary.layers += 1;
        summary.add(&findings);
    }
    let mut above = Vec::new();
    for (paths, state) in &writable {
        let mut findings = Findings::new(Some(paths.data.clone().into()), tell);
        above.extend(upper::check(paths, *state, progress, &mut findings)?);
        summary.layers += 1;
        summary.add(&findings);
    }
    let mut findings = Findings::new(None, tell);
    let count = files.layers().len();
    if count > UPSTREAM_LAYERS {
        let what = format!("{count} layers; upstream opens at most {UPSTREAM_LAYERS}");
        findings.note(None, what)?;
    }
    if summary.broken == 0 {
        check_stack(files, &above, &mut findings)?;
    }
    summary.add(&findings);
    Ok(summary)
}

/// Loads the stack as the daemon does, and reports layers in wrong places.
fn check_stack(
    files: OpenFiles,
    above: &[Placed],
    findings: &mut Findings<'_>,
) -> Result<(), Error> {
    let lineage = files.lineage();
    // Each layer in a wrong place is a finding of its own.
    let image = match files.layers() {
        [] => Ok(Image::empty(lineage)),
        _ => files.stack(lineage).and_then(Image::load_in_any_order),
    };
    match image.and_then(|image| image.placed(above)) {
        Ok(placed) => check_order(&placed, lineage, findings),
        Err(error) => findings.broken(None, &error),
    }
}

/// Checks one layer; returns the number of its blocks.
fn check_layer(
    layer: &OpenLayer,
    threads: NonZero<usize>,
    progress: &ProgressBar,
    findings: &mut Findings<'_>,
) -> Result<u64, Error> {
    let opened = match &layer.blob {
        Ok(blob) => container::open(blob.clone(), findings)?.map(|container| (blob, container)),
        Err(error) => {
            findings.broken(None, error)?;
            None
        }
    };
    let Some((blob, container)) = opened else {
        return Ok(0);
    };
    let loaded = loads(blob);
    if let Err(error) = &loaded {
        findings.end_if_unfetched(error)?;
    }
    if let Err(error @ (image::Error::Unsealed { .. } | image::Error::InUse { .. })) = &loaded {
        // Its structures are not there yet.
        findings.broken(None, error)?;
        return Ok(0);
    }
    let layout = layout::Layout::read(&container, findings)?;
    blocks::check(&container, &layout, threads, progress, findings)?;
    if let LayerRef::Remote(remote) = &layer.name {
        digest::check(blob, &remote.digest, findings)?;
    }
    if let (0, Err(error)) = (findings.damage(), &loaded) {
        findings.broken(None, error)?;
    }
    Ok(container.zfile_map().map_or(0, |map| map.table().blocks()))
}

/// Loads the layer as the daemon does.
fn loads(blob: &Arc<Blob>) -> Result<(), image::Error> {
    Layer::load(blob.clone()).map(drop)
}

/// Reports layers above another stack than the one they were made upon.
///
/// A single layer may be part of any image. Several are an image that the daemon has to serve.
fn check_order(
    placed: &[Placed],
    lineage: Lineage,
    findings: &mut Findings<'_>,
) -> Result<(), Error> {
    if let Some(Placed { layer, parent, .. }) = placed
        .first()
        .filter(|first| !first.parent.is_nil() && first.made_upon.is_none())
    {
        let what = format!("{layer} has parent {parent}, but no layer is below it");
        findings.note(None, what)?;
    }
    let is_note = lineage == Lineage::Ignored || placed.len() == 1;
    for error in lineage.misplaced(placed) {
        match is_note {
            true => findings.note(None, error.to_string())?,
            false => findings.broken(None, &error)?,
        }
    }
    Ok(())
}
