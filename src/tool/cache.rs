//! `ovbd cache`: lists, shrinks and verifies a cache directory.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use indicatif::ProgressBar;
use serde::Serialize;

use crate::cache::{Cache, Error, Item};
use crate::format::digest::Digest;

/// The blobs of a cache, as a table or as JSON.
#[derive(Debug, Serialize)]
pub struct Listing {
    blobs: Vec<Row>,
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
        let used = item.used.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            digest: item.digest.to_string(),
            complete: item.complete,
            size: item.len,
            present: item.present,
            stored: item.stored,
            in_use: item.in_use,
            used: used.as_secs(),
        }
    }
}

/// Lists the blobs of a cache.
///
/// # Errors
/// [`Error::File`] if a directory cannot be read.
pub fn list(cache: &Cache) -> Result<Listing, Error> {
    let items = cache.list()?;
    let blobs = items.into_iter().map(Row::from).collect();
    Ok(Listing { blobs })
}

impl fmt::Display for Listing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.unwrap_or_default().as_secs();
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
        Ok(())
    }
}

/// Verifies complete blobs, all or the named ones, and removes damaged ones. Reports each blob that
/// is damaged, and each named one that is not complete. Returns their number.
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
    let chosen: Vec<_> = match digests.is_empty() {
        true => all.map(|item| item.digest).collect(),
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
        match cache.verify(digest)? {
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
