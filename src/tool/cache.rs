//! `ovbd cache`: lists, shrinks and verifies a cache directory.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use indicatif::ProgressBar;
use serde::Serialize;

use super::table::{Align, Table, count, size, span};
use crate::cache::{Cache, Error, Evicted, Item, Removal, TablesItem};
use crate::format::digest::Digest;

/// The blobs and image tables of a cache, as text or as JSON.
#[derive(Debug, Serialize)]
pub struct Listing {
    blobs: Vec<Row>,
    tables: Vec<TablesRow>,
}

#[derive(Debug, Serialize)]
struct TablesRow {
    /// Key of the stack.
    key: String,
    complete: bool,
    layers: u32,
    segments: u64,
    stored: u64,
    in_use: bool,
    /// Seconds since 1970.
    used: u64,
}

impl From<TablesItem> for TablesRow {
    fn from(item: TablesItem) -> Self {
        let counts = item.counts.unwrap_or_default();
        Self {
            key: item.key.to_string(),
            complete: item.counts.is_some(),
            layers: counts.layers,
            segments: counts.segments,
            stored: item.stored,
            in_use: item.in_use,
            used: seconds(item.used),
        }
    }
}

/// Seconds since 1970.
fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}

#[derive(Debug, Serialize)]
struct Row {
    digest: String,
    complete: bool,
    size: u64,
    present: u64,
    stored: u64,
    in_use: bool,
    /// Seconds since 1970.
    used: u64,
}

impl From<Item> for Row {
    fn from(item: Item) -> Self {
        Self {
            digest: item.digest.to_string(),
            complete: item.complete,
            size: item.len,
            present: item.present,
            stored: item.stored,
            in_use: item.in_use,
            used: seconds(item.used),
        }
    }
}

/// Lists the blobs and image tables of a cache.
///
/// # Errors
/// [`Error::File`] if a directory cannot be read.
pub fn list(cache: &Cache) -> Result<Listing, Error> {
    let blobs = cache.list()?.into_iter().map(Row::from).collect();
    let tables = cache.list_tables()?.into_iter();
    let tables = tables.map(TablesRow::from).collect();
    Ok(Listing { blobs, tables })
}

impl fmt::Display for Listing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let now = seconds(SystemTime::now());
        let ago = |used: u64| format!("{} ago", span(now.saturating_sub(used)));
        let mut blobs = Table::new([
            ("DIGEST", Align::Left),
            ("STATE", Align::Left),
            ("SIZE", Align::Right),
            ("PRESENT", Align::Right),
            ("STORED", Align::Right),
            ("USED", Align::Right),
        ]);
        for row in &self.blobs {
            let state = match (row.complete, row.in_use) {
                (true, true) => "in use",
                (true, false) => "complete",
                (false, true) => "filling",
                (false, false) => "partial",
            };
            blobs.add([
                row.digest.clone(),
                state.to_owned(),
                size(row.size),
                size(row.present),
                size(row.stored),
                ago(row.used),
            ]);
        }
        write!(f, "{blobs}")?;
        if self.tables.is_empty() {
            return Ok(());
        }
        let mut tables = Table::new([
            ("IMAGE TABLES", Align::Left),
            ("STATE", Align::Left),
            ("LAYERS", Align::Right),
            ("SEGMENTS", Align::Right),
            ("STORED", Align::Right),
            ("USED", Align::Right),
        ]);
        for row in &self.tables {
            let state = match (row.complete, row.in_use) {
                (true, true) => "in use",
                (true, false) => "complete",
                (false, true) => "writing",
                (false, false) => "incomplete",
            };
            tables.add([
                row.key.clone(),
                state.to_owned(),
                row.layers.to_string(),
                count(row.segments),
                size(row.stored),
                ago(row.used),
            ]);
        }
        write!(f, "\n{tables}")
    }
}

/// What was removed from a cache to shrink it. Field names are those of the JSON.
#[derive(Debug, Serialize)]
pub struct Shrunk {
    files: u64,
    bytes: u64,
    /// Bytes that are in use and were to be removed too.
    in_use_bytes: u64,
}

impl From<Evicted> for Shrunk {
    fn from(evicted: Evicted) -> Self {
        Self {
            files: evicted.files,
            bytes: evicted.bytes,
            in_use_bytes: evicted.missing,
        }
    }
}

impl fmt::Display for Shrunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "removed {} files, {}", self.files, size(self.bytes))?;
        match self.in_use_bytes {
            0 => Ok(()),
            more => writeln!(f, "cannot remove {} more: they are in use", size(more)),
        }
    }
}

/// What became of blobs and image tables that were to be removed. Field names are those of the JSON.
#[derive(Debug, Default, Serialize)]
pub struct Removed {
    removed: Vec<String>,
    /// Those that are in use, and are kept.
    in_use: Vec<String>,
    /// Those that are not in the cache.
    absent: Vec<String>,
}

impl Removed {
    /// Returns whether all were removed.
    pub fn is_ok(&self) -> bool {
        self.in_use.is_empty() && self.absent.is_empty()
    }
}

impl fmt::Display for Removed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (digests, what) in [
            (&self.removed, "removed"),
            (&self.in_use, "is in use"),
            (&self.absent, "is not in the cache"),
        ] {
            for digest in digests {
                writeln!(f, "{digest} {what}")?;
            }
        }
        Ok(())
    }
}

/// Removes blobs and image tables that are not in use.
///
/// # Errors
/// [`Error::File`] and [`Error::Locked`] if the system fails.
pub fn remove(cache: &Cache, digests: &[Digest]) -> Result<Removed, Error> {
    let mut result = Removed::default();
    for digest in digests {
        let list = match cache.remove(digest)? {
            Removal::Removed => &mut result.removed,
            Removal::InUse => &mut result.in_use,
            Removal::Absent => &mut result.absent,
        };
        list.push(digest.to_string());
    }
    Ok(result)
}

/// Result of verifying a cache. Field names are those of the JSON.
#[derive(Debug, Serialize)]
pub struct Verified {
    /// Number of blobs and image tables that were verified.
    verified: usize,
    /// Those that were damaged, and are removed.
    damaged: Vec<String>,
    /// Those that were named and are not complete.
    incomplete: Vec<String>,
}

impl Verified {
    /// Returns whether all are complete and undamaged.
    pub fn is_ok(&self) -> bool {
        self.damaged.is_empty() && self.incomplete.is_empty()
    }
}

impl fmt::Display for Verified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for digest in &self.damaged {
            writeln!(f, "{digest} was damaged; removed it")?;
        }
        for digest in &self.incomplete {
            writeln!(f, "{digest} is not complete")?;
        }
        Ok(())
    }
}

/// Verifies complete blobs and image tables, all or the named ones, and removes damaged ones. Returns
/// those that are damaged, and the named ones that are not complete.
///
/// # Errors
/// [`Error::File`] and [`Error::Locked`] if the system fails.
pub fn verify(cache: &Cache, digests: &[Digest], bar: &ProgressBar) -> Result<Verified, Error> {
    let items = cache.list()?;
    let all = items.iter().filter(|item| item.complete);
    let tables = cache.list_tables()?;
    let is_table = |digest: &Digest| tables.iter().any(|item| item.key == *digest);
    let written = |item: &&TablesItem| item.counts.is_some() || !item.in_use;
    let written = tables.iter().filter(written);
    let chosen: Vec<_> = match digests.is_empty() {
        true => all
            .map(|item| item.digest)
            .chain(written.map(|item| item.key))
            .collect(),
        false => digests.to_vec(),
    };
    let len = |digest: &Digest| {
        let found = items
            .iter()
            .find(|item| item.complete && item.digest == *digest);
        found.map_or(0, |item| item.len)
    };
    bar.set_length(chosen.iter().map(len).sum());
    let mut found = Verified {
        verified: chosen.len(),
        damaged: Vec::new(),
        incomplete: Vec::new(),
    };
    for digest in &chosen {
        let verified = match is_table(digest) {
            true => cache.verify_tables(digest)?,
            false => cache.verify(digest)?,
        };
        match verified {
            Some(true) => {}
            Some(false) => found.damaged.push(digest.to_string()),
            None => found.incomplete.push(digest.to_string()),
        }
        bar.inc(len(digest));
    }
    Ok(found)
}
