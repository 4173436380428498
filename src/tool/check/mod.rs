//! `ovbd check`: verifies every checksum, block and mapping of every layer of a stack.
//!
//! `container` (wrappers) and `layout` (header, trailer, index) take a layer apart, and continue
//! after damage where possible. `blocks` then reads and decodes all of it on many threads. `upper`
//! checks a writable layer; `digest`, the digest of a layer in a registry. The caller gets each finding at once. In the end the stack is loaded as
//! the daemon does it, so that a checked stack is never refused there.

use std::fmt;
use std::num::NonZero;
use std::sync::Arc;

use serde::Serialize;

use super::Error;
use super::open_files::{OpenFiles, OpenLayer};
use super::paint::{Colour, Paint};
use crate::image::layer::Layer;
use crate::image::lineage::Placed;
use crate::image::{self, Image, Lineage};
use crate::reason::reason;
use crate::source::{Blob, FetchError, FetchErrorKind, LayerRef};
use crate::writable::load::waits_for_seal;
use indicatif::ProgressBar;

mod blocks;
mod container;
mod digest;
mod layout;
mod upper;

/// Most layers of an image that upstream opens.
const UPSTREAM_LAYERS: usize = 255;

/// A finding about a layer or the stack.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Whether it is damage.
    pub kind: FindingKind,
    /// The layer; `None`: the stack.
    pub layer: Option<LayerRef>,
    /// Byte of the file, if the finding has one place.
    pub offset: Option<u64>,
    /// Description, with the block and the sectors that are affected.
    pub what: String,
}

/// Kind of a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FindingKind {
    /// Damage.
    Broken,
    /// A mark of an old tool, a limit of the upstream reader, or an order that was accepted.
    Note,
}

impl Finding {
    /// Returns the finding as a line, whose first word may have a colour.
    pub fn painted(&self, paint: Paint) -> String {
        let colour = match self.kind {
            FindingKind::Broken => Colour::Red,
            FindingKind::Note => Colour::Yellow,
        };
        paint.first_word(colour, &self.to_string())
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            FindingKind::Note => "note",
            FindingKind::Broken => "broken",
        };
        match &self.layer {
            Some(layer) => write!(f, "{kind}: {layer}: ")?,
            None => write!(f, "{kind}: the stack: ")?,
        }
        if let Some(offset) = self.offset {
            write!(f, "byte {offset}: ")?;
        }
        f.write_str(&self.what)
    }
}

/// Result of a check.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Outcome {
    /// Number of layers that were checked.
    pub layers: usize,
    /// Number of compressed blocks that were read, damaged ones included.
    pub blocks: u64,
    /// Number of findings that are damage.
    pub broken: u64,
    /// Number of notes.
    pub notes: u64,
}

/// Result of a check with its findings, as JSON.
#[derive(Debug, Serialize)]
pub struct Report<'a> {
    ok: bool,
    #[serde(flatten)]
    outcome: Outcome,
    findings: &'a [Finding],
}

impl Outcome {
    /// Returns whether nothing is damaged, and, if `strict`, whether there is no note.
    pub fn is_ok(&self, strict: bool) -> bool {
        self.broken == 0 && !(strict && self.notes > 0)
    }

    /// Returns the result as a line, whose first word may have a colour.
    pub fn painted(&self, paint: Paint, strict: bool) -> String {
        match (self.broken, self.is_ok(strict)) {
            (0, true) => paint.first_word(Colour::Green, &self.to_string()),
            (0, false) => {
                let line = format!("not {self} (--strict)");
                paint.first_word(Colour::Red, &line)
            }
            _ => paint.first_word(Colour::Red, &self.to_string()),
        }
    }

    /// Adds the findings, and whether all is well.
    pub fn with(self, findings: &[Finding], ok: bool) -> Report<'_> {
        Report {
            ok,
            outcome: self,
            findings,
        }
    }

    /// Adds the findings about one layer or the stack.
    fn add(&mut self, findings: &Findings<'_>) {
        self.broken += findings.broken;
        self.notes += findings.notes;
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            layers,
            blocks,
            broken,
            notes,
        } = self;
        match broken {
            0 => f.write_str("ok")?,
            _ => write!(f, "broken: {broken}")?,
        }
        write!(f, "; layers: {layers}; blocks: {blocks}")?;
        match notes {
            0 => Ok(()),
            _ => write!(f, "; notes: {notes}"),
        }
    }
}

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
) -> Result<Outcome, Error> {
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
    let mut outcome = Outcome::default();
    files.start_reading();
    for layer in files.layers() {
        let mut findings = Findings::new(Some(layer.name.clone()), tell);
        outcome.blocks += check_layer(layer, threads, progress, &mut findings)?;
        outcome.layers += 1;
        outcome.add(&findings);
    }
    let mut above = Vec::new();
    for (paths, state) in &writable {
        let mut findings = Findings::new(Some(paths.data.clone().into()), tell);
        above.extend(upper::check(paths, *state, progress, &mut findings)?);
        outcome.layers += 1;
        outcome.add(&findings);
    }
    let mut findings = Findings::new(None, tell);
    let count = files.layers().len();
    if count > UPSTREAM_LAYERS {
        let what = format!("{count} layers; upstream opens at most {UPSTREAM_LAYERS}");
        findings.note(None, what)?;
    }
    if outcome.broken == 0 {
        check_stack(files, &above, &mut findings)?;
    }
    outcome.add(&findings);
    Ok(outcome)
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
    if let (0, Err(error)) = (findings.broken, &loaded) {
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

/// Collects the findings about one layer.
struct Findings<'f> {
    layer: Option<LayerRef>,
    broken: u64,
    notes: u64,
    tell: &'f mut dyn FnMut(&Finding) -> Result<(), Error>,
}

impl<'f> Findings<'f> {
    /// No finding.
    fn new(
        layer: Option<LayerRef>,
        tell: &'f mut dyn FnMut(&Finding) -> Result<(), Error>,
    ) -> Self {
        Self {
            layer,
            broken: 0,
            notes: 0,
            tell,
        }
    }

    /// Ends the check with an error if this one is of a fetch: a registry that does not answer is no
    /// damage, and each further read would wait for it, too.
    fn end_if_unfetched(&self, error: &(dyn std::error::Error + 'static)) -> Result<(), Error> {
        let mut cause = Some(error);
        while let Some(error) = cause {
            if let Some(source) = error.downcast_ref::<FetchError>()
                && source.kind() != FetchErrorKind::Damaged
            {
                let stack = || "the stack".to_owned();
                let what = self.layer.as_ref().map_or_else(stack, LayerRef::to_string);
                let source = source.clone();
                return Err(Error::Unfetched { what, source });
            }
            cause = error.source();
        }
        Ok(())
    }

    fn broken(
        &mut self,
        offset: Option<u64>,
        error: &(dyn std::error::Error + 'static),
    ) -> Result<(), Error> {
        self.end_if_unfetched(error)?;
        self.broken += 1;
        self.add(FindingKind::Broken, offset, reason(error))
    }

    /// Reports damage at a place in the layer, and what it affects.
    fn broken_at(
        &mut self,
        place: container::FilePlace,
        error: &(dyn std::error::Error + 'static),
        consequence: &str,
    ) -> Result<(), Error> {
        self.end_if_unfetched(error)?;
        self.broken += 1;
        let block = place.block.map(|block| format!("block {block}: "));
        let what = block.unwrap_or_default() + &reason(error) + consequence;
        self.add(FindingKind::Broken, Some(place.offset), what)
    }

    fn note(&mut self, offset: Option<u64>, what: String) -> Result<(), Error> {
        self.notes += 1;
        self.add(FindingKind::Note, offset, what)
    }

    fn add(&mut self, kind: FindingKind, offset: Option<u64>, what: String) -> Result<(), Error> {
        (self.tell)(&Finding {
            kind,
            layer: self.layer.clone(),
            offset,
            what,
        })
    }
}
