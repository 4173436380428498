//! Drops bytes that were read from the page cache, in large regions.
//!
//! File systems cache folios of many pages and drop a folio only as a whole, so dropping the bytes of one
//! small read drops nothing. A region is thus dropped once a worker reads another one. Dropping reads
//! nothing: absent bytes stay absent.

use crate::source::Blob;

/// Length of a region. Folios have at most 2 MiB where pages have 4 KiB.
const REGION: u64 = 4 << 20;

/// The region that one worker read last.
#[derive(Debug, Default)]
pub struct DropBehind<'a> {
    last: Option<(&'a Blob, u64)>,
}

impl<'a> DropBehind<'a> {
    /// Records a read. If it ends in another region than the read before, drops that one's region.
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
