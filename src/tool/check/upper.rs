//! Checks a writable layer: index file, journal, and whether all of its data can be read.

use indicatif::ProgressBar;

use super::super::Error;
use super::super::loaded_stack::WritableLayerReader;
use super::super::unit::CHUNK;
use super::findings::Findings;
use crate::format::lsmt::writable::Kind;
use crate::image::lineage::Placed;
use crate::units::{Sector, Sectors};
use crate::writable::Paths;
use crate::writable::extent_map::ExtentMap;

/// How a pair of files is used.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// Writes go to it.
    Active,
    /// A snapshot froze it, and it is not sealed yet.
    Frozen,
}

/// Reports what is wrong with a writable layer. `None`: it cannot be opened.
pub(super) fn check(
    paths: &Paths,
    state: State,
    progress: &ProgressBar,
    findings: &mut Findings<'_>,
) -> Result<Option<Placed>, Error> {
    let upper = match WritableLayerReader::open(paths, ExtentMap::new()) {
        Ok(upper) => upper,
        Err(error) => {
            findings.broken(None, &error)?;
            return Ok(None);
        }
    };
    if upper.layer().index_is_stale() {
        let what = match upper.layer().kind() {
            Kind::Sparse if upper.layer().index().entries() == 0 => {
                "no index; the content is derived from the holes of the data file, in file system \
                 blocks"
            }
            _ => {
                "the index has torn entries or entries without data; their writes were never durable"
            }
        };
        findings.note(None, what.to_owned())?;
    }
    if upper.layer().journal_len() > 0 {
        let count = upper.layer().journal_len();
        let what = format!(
            "{count} mappings in the journal: the last daemon was killed; they are part of the layer"
        );
        findings.note(None, what)?;
    }
    let size = upper.layer().header().virtual_size;
    let end = Sector::at_or_after(size);
    let beyond = upper
        .layer()
        .map()
        .iter()
        .filter(|extent| extent.end() > end);
    match beyond.count() {
        0 => {}
        _ if size == 0 => {}
        count => {
            let what = format!("{count} extents reach beyond the disk of this layer");
            findings.note(None, what)?;
        }
    }
    if state == State::Frozen {
        let Paths { data, index } = paths;
        let (data, index) = (data.display(), index.display());
        let what = format!(
            "frozen by a snapshot and not sealed yet: start the disk, which seals it, or use `ovbd \
             seal --upper data={data},index={index}`"
        );
        findings.note(None, what)?;
    }
    read_all(&upper, progress, findings)?;
    Ok(Some(upper.placed()))
}

/// Reads all data that is in use. A writable layer has no checksums.
fn read_all(
    upper: &WritableLayerReader,
    progress: &ProgressBar,
    findings: &mut Findings<'_>,
) -> Result<(), Error> {
    progress.set_length(upper.data_len());
    progress.set_position(0);
    let mut buffer = vec![0; CHUNK];
    let most = Sectors::whole_in(CHUNK as u64);
    let data = upper
        .layer()
        .map()
        .iter()
        .filter_map(|extent| extent.data());
    for step in data.flat_map(|data| data.steps(most)) {
        let bytes = step.bytes();
        if upper.is_hole(&bytes) {
            continue;
        }
        // At most the length of the buffer.
        let part = &mut buffer[..step.len().bytes() as usize];
        if let Err(error) = upper.read(step.start(), part) {
            findings.broken(Some(bytes.start), &error)?;
        }
        progress.inc(step.len().bytes());
    }
    Ok(())
}
