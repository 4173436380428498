//! Drops bytes that were read from the page cache, region by region.
//!
//! File systems cache in folios of many pages and drop them only as a whole, so dropping the bytes of
//! one small read drops nothing. A region is dropped when the reader moves on to another. Dropping
//! reads nothing: absent bytes stay absent.

use crate::source::Blob;

/// Bytes of a region. Folios have 2 MiB at most where pages have 4 KiB.
const REGION: u64 = 4 << 20;

/// The region that one worker read last.
#[derive(Debug, Default)]
pub struct DropBehind<'a> {
    last: Option<(&'a Blob, u64)>,
}

impl<'a> DropBehind<'a> {
    /// Notes a read, and drops the region of the read before if this one ends in another.
    pub fn read(&mut self, blob: &'a Blob, offset: u64, len: u64) {
        let region = offset.saturating_add(len).saturating_sub(1) / REGION;
        match self.last {
            Some((same, last)) if std::ptr::eq(same, blob) && last == region => {}
            Some((other, last)) => {
                other.drop_cached(last * REGION, REGION);
                self.last = Some((blob, region));
            }
            None => self.last = Some((blob, region)),
        }
    }
}
