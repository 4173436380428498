//! The last line of a check.

use std::fmt;

use serde::Serialize;

use super::super::paint::{Colour, Paint};
use super::findings::{Finding, Findings};

/// Numbers of what was checked and found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CheckSummary {
    /// Number of layers that were checked.
    pub layers: usize,
    /// Number of compressed blocks that were read, damaged ones included.
    pub blocks: u64,
    /// Number of findings that are damage.
    pub broken: u64,
    /// Number of notes.
    pub notes: u64,
}

/// The summary with the findings, as JSON.
#[derive(Debug, Serialize)]
pub struct Report<'a> {
    ok: bool,
    #[serde(flatten)]
    summary: CheckSummary,
    findings: &'a [Finding],
}

impl CheckSummary {
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
            summary: self,
            findings,
        }
    }

    /// Adds the findings about one layer or the stack.
    pub(super) fn add(&mut self, findings: &Findings<'_>) {
        self.broken += findings.damage();
        self.notes += findings.notes();
    }
}

impl fmt::Display for CheckSummary {
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
