//! Lets the page cache go of what was read, region by region.
//!
//! File systems cache in folios of many pages, and drop one only as a whole: to drop just what a
//! small read wanted drops nothing. So a region goes when the reader moves on to another.

use crate::source::Blob;

/// Bytes of a region: folios are 2 MiB at most where pages are 4 KiB.
const REGION: u64 = 4 << 20;

/// What one worker read last.
#[derive(Debug, Default)]
pub struct DropBehind<'a> {
    last: Option<(&'a Blob, u64)>,
}

impl<'a> DropBehind<'a> {
    /// Notes a read, and drops the region read before if this one ends in another.
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
