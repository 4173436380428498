//! `ovbd cache`: lists, shrinks and verifies a cache directory.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use indicatif::ProgressBar;
use serde::Serialize;

use crate::cache::{Cache, Error, Item, TablesItem};
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
        writeln!(
            f,
            "{:71}  {:8}  {:>14}  {:>14}  {:>14}  {:>10}",
            "DIGEST", "STATE", "SIZE", "PRESENT", "STORED", "USED"
        )?;
        for row in &self.blobs {
            let state = match (row.complete, row.in_use) {
                (true, true) => "in use",
                (true, false) => "complete",
                (false, true) => "filling",
                (false, false) => "partial",
            };
            let ago = format!("{} s ago", now.saturating_sub(row.used));
            writeln!(
                f,
                "{:71}  {state:8}  {:>14}  {:>14}  {:>14}  {ago:>10}",
                row.digest, row.size, row.present, row.stored
            )?;
        }
        if self.tables.is_empty() {
            return Ok(());
        }
        writeln!(
            f,
            "\n{:71}  {:10}  {:>12}  {:>14}  {:>14}  {:>10}",
            "IMAGE TABLES", "STATE", "LAYERS", "SEGMENTS", "STORED", "USED"
        )?;
        for row in &self.tables {
            let state = match (row.complete, row.in_use) {
                (true, true) => "in use",
                (true, false) => "complete",
                (false, true) => "writing",
                (false, false) => "incomplete",
            };
            let ago = format!("{} s ago", now.saturating_sub(row.used));
            writeln!(
                f,
                "{:71}  {state:10}  {:>12}  {:>14}  {:>14}  {ago:>10}",
                row.key, row.layers, row.segments, row.stored
            )?;
        }
        Ok(())
    }
}

/// Verifies complete blobs and image tables, all or the named ones, and removes damaged ones. Reports
/// each that is damaged, and each named one that is not complete. Returns their number.
///
/// # Errors
/// [`Error::File`] and [`Error::Locked`] if the system fails.
pub fn verify(
    cache: &Cache,
    digests: &[Digest],
    bar: &ProgressBar,
    tell: &mut dyn FnMut(&str),
) -> Result<usize, Error> {
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
    let mut wrong = 0;
    for digest in &chosen {
        let verified = match is_table(digest) {
            true => cache.verify_tables(digest)?,
            false => cache.verify(digest)?,
        };
        match verified {
            Some(true) => {}
            Some(false) => {
                wrong += 1;
                tell(&format!("{digest} was damaged; removed it"));
            }
            None => {
                wrong += 1;
                tell(&format!("{digest} is not complete"));
            }
        }
        bar.inc(len(digest));
    }
    Ok(wrong)
}
