//! What a check finds: damage, and notes.

use std::fmt;

use serde::Serialize;

use super::super::Error;
use super::super::paint::{Colour, Paint};
use crate::reason::reason;
use crate::source::{FetchError, FetchErrorKind, LayerRef};

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

/// Where the file holds a byte of the layer.
#[derive(Clone, Copy, Debug)]
pub(super) struct FilePlace {
    /// Number of the compressed block, if any.
    pub(super) block: Option<u64>,
    /// Byte of the file: its own, or the start of its block.
    pub(super) offset: u64,
}

/// Collects the findings about one layer.
pub(super) struct Findings<'f> {
    layer: Option<LayerRef>,
    broken: u64,
    notes: u64,
    tell: &'f mut dyn FnMut(&Finding) -> Result<(), Error>,
}

impl<'f> Findings<'f> {
    /// No finding.
    pub(super) fn new(
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

    /// Number of findings that are damage.
    pub(super) fn damage(&self) -> u64 {
        self.broken
    }

    /// Number of notes.
    pub(super) fn notes(&self) -> u64 {
        self.notes
    }

    /// Ends the check with an error if this one is of a fetch: a registry that does not answer is no
    /// damage, and each further read would wait for it, too.
    pub(super) fn end_if_unfetched(
        &self,
        error: &(dyn std::error::Error + 'static),
    ) -> Result<(), Error> {
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

    /// Reports damage, at a byte of the file if it has one place.
    pub(super) fn broken(
        &mut self,
        offset: Option<u64>,
        error: &(dyn std::error::Error + 'static),
    ) -> Result<(), Error> {
        self.end_if_unfetched(error)?;
        self.broken += 1;
        self.add(FindingKind::Broken, offset, reason(error))
    }

    /// Reports damage at a place in the layer, and what it affects.
    pub(super) fn broken_at(
        &mut self,
        place: FilePlace,
        error: &(dyn std::error::Error + 'static),
        consequence: &str,
    ) -> Result<(), Error> {
        self.end_if_unfetched(error)?;
        self.broken += 1;
        let block = place.block.map(|block| format!("block {block}: "));
        let what = block.unwrap_or_default() + &reason(error) + consequence;
        self.add(FindingKind::Broken, Some(place.offset), what)
    }

    /// Reports what is not damage.
    pub(super) fn note(&mut self, offset: Option<u64>, what: String) -> Result<(), Error> {
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
