//! Located ranges of a blob: a present range can be read, an absent range can be fetched.

use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::Advice;
use rustix::io::ReadWriteFlags;
use vm_memory::VolatileSlice;

use super::refetch::FetchCount;
use super::waker::{FetchError, FetchErrorKind, Presence, Ticket, Waker};
use super::{Blob, Error};

/// Result of [`Blob::locate`].
#[derive(Debug)]
pub enum Located<'b> {
    /// All of its bytes are local.
    Present(PresentRange<'b>),
    /// Some of its bytes are not local.
    Absent(AbsentRange<'b>),
}

/// A range of a blob whose bytes are local. They stay local while the blob is open, unless they are
/// rejected ([`Blob::reject`]).
#[derive(Clone, Copy, Debug)]
pub struct PresentRange<'b> {
    blob: &'b Blob,
    offset: u64,
    len: usize,
}

impl<'b> PresentRange<'b> {
    #[inline]
    pub(super) fn new(blob: &'b Blob, offset: u64, len: usize) -> Self {
        Self { blob, offset, len }
    }

    /// The blob.
    pub fn blob(&self) -> &'b Blob {
        self.blob
    }

    /// First byte of the range.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Rejects the range, whose bytes are damaged, as [`Blob::reject`] does. Returns whether it is fetched
    /// again when it is located and requested.
    pub fn reject(&self) -> bool {
        self.blob.reject(self.offset, self.len)
    }

    /// Number of bytes.
    #[expect(
        clippy::len_without_is_empty,
        reason = "ranges that are read are not empty"
    )]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns the mapped bytes, if all are known to be in memory. The caller copies them and then checks
    /// [`Blob::is_lost`]: if true, the copy is not the content of the file.
    #[inline]
    pub fn resident(&self) -> Option<VolatileSlice<'b>> {
        self.blob.resident_map()?.resident(self.offset, self.len)
    }

    /// Marks the range as in memory, because it was just read.
    pub fn note(&self) {
        if let Some(resident_map) = self.blob.resident_map() {
            resident_map.note(self.offset, self.len);
        }
    }

    /// Prefetches the page-table entries of the range. To be called before [`PresentRange::prefetch`].
    #[inline]
    pub fn prefetch_pages(&self) {
        if let Some(resident_map) = self.blob.resident_map() {
            resident_map.prefetch_pages(self.offset, self.len);
        }
    }

    /// Prefetches the first bytes of the range.
    #[inline]
    pub fn prefetch(&self) {
        if let Some(resident_map) = self.blob.resident_map() {
            resident_map.prefetch(self.offset, self.len);
        }
    }

    /// Advises the kernel to read the range into memory. Never waits.
    pub fn will_need(&self) {
        if self.resident().is_none() {
            self.blob
                .advise(self.offset, self.len as u64, Advice::WillNeed);
        }
    }

    /// Fills `buffer`, which has the length of the range, if the page cache has all of the range. Returns
    /// whether it did. Never waits for storage.
    ///
    /// # Errors
    /// [`Error::Short`] if the file ends first.
    pub fn read_cached(&self, buffer: &mut [u8]) -> Result<bool, Error> {
        let buffer = self.fitted(buffer);
        let expected = buffer.len();
        let mut into = [io::IoSliceMut::new(buffer)];
        let file = self.blob.file();
        match rustix::io::preadv2(file, &mut into, self.offset, ReadWriteFlags::NOWAIT) {
            Ok(0) if expected > 0 => Err(self.short(0)),
            Ok(count) => Ok(count == expected),
            // The caller then reads with `read_exact`, which reports the error.
            Err(_) => Ok(false),
        }
    }

    /// Fills `buffer`, which has the length of the range. Waits for storage.
    ///
    /// # Errors
    /// [`Error::Read`] if the system fails, [`Error::Short`] if the file ends first.
    pub fn read_exact(&self, buffer: &mut [u8]) -> Result<(), Error> {
        let buffer = self.fitted(buffer);
        let mut found = 0;
        while found < buffer.len() {
            let at = self.offset.saturating_add(found as u64);
            match self.blob.file().read_at(&mut buffer[found..], at) {
                Ok(0) => return Err(self.short(found)),
                Ok(count) => found += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(self.failed(source)),
            }
        }
        Ok(())
    }

    /// Descriptor for reading the range. Other ranges may be absent and must not be read through it.
    pub fn descriptor(&self) -> BorrowedFd<'b> {
        self.blob.descriptor()
    }

    /// Creates the error of a failed read of the range.
    pub fn failed(&self, source: io::Error) -> Error {
        self.blob.failed(self.offset, self.len, source)
    }

    /// Creates the error of a read of the range that reached the end of the file after `found` bytes.
    pub fn short(&self, found: usize) -> Error {
        self.blob.short(self.offset, self.len, found)
    }

    /// Cuts `buffer` to the length of the range: bytes after the range may be absent.
    fn fitted<'a>(&self, buffer: &'a mut [u8]) -> &'a mut [u8] {
        debug_assert_eq!(buffer.len(), self.len);
        let len = self.len.min(buffer.len());
        &mut buffer[..len]
    }
}

/// A range of a blob with absent bytes, which must be fetched before it can be read.
#[derive(Clone, Copy, Debug)]
pub struct AbsentRange<'b> {
    blob: &'b Blob,
    presence: &'b Arc<dyn Presence>,
    offset: u64,
    /// Number of bytes of the range before the end of the blob.
    inside: u64,
    /// Number of bytes of the range.
    len: usize,
}

impl<'b> AbsentRange<'b> {
    pub(super) fn new(
        blob: &'b Blob,
        presence: &'b Arc<dyn Presence>,
        offset: u64,
        inside: u64,
        len: usize,
    ) -> Self {
        Self {
            blob,
            presence,
            offset,
            inside,
            len,
        }
    }

    /// Requests the bytes of the range. `waker` receives `ticket` once, when all bytes are present or cannot
    /// be fetched. Never waits.
    pub fn request(&self, waker: &Arc<Waker>, ticket: Ticket) {
        self.presence
            .request(self.offset, self.inside, waker, ticket);
    }

    /// Suggests to fetch the range before it is requested. Never waits.
    pub fn fetch_ahead(&self) {
        self.presence.fetch_ahead(self.offset, self.inside);
    }

    /// Suggests to fetch the range because it is in a trace. Never waits.
    pub fn replay(&self) {
        self.presence.replay(self.offset, self.inside);
    }

    /// Longest time that a blocking reader should wait.
    pub fn patience(&self) -> Duration {
        self.presence.patience()
    }

    /// Requests the range and waits for it until `deadline`.
    ///
    /// # Errors
    /// [`Error::Fetch`] if the bytes cannot be fetched before the deadline.
    pub fn wait(&self, deadline: Instant) -> Result<PresentRange<'b>, Error> {
        let failed = |kind, reason: String| self.error(FetchError::new(kind, reason));
        let system = |error: io::Error| failed(FetchErrorKind::System, error.to_string());
        let waker = Waker::new().map_err(system)?;
        let mut fetched = Vec::new();
        let mut count = FetchCount::FIRST;
        loop {
            self.request(&waker, Ticket(0));
            while fetched.is_empty() {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    let reason = "the deadline for waiting has passed".to_owned();
                    return Err(failed(FetchErrorKind::Timeout, reason));
                }
                let mut polled = [PollFd::new(&waker, PollFlags::IN)];
                let timeout = Timespec::try_from(left).ok();
                match poll(&mut polled, timeout.as_ref()) {
                    Ok(_) | Err(rustix::io::Errno::INTR) => {}
                    Err(errno) => return Err(system(errno.into())),
                }
                waker.take(&mut fetched);
            }
            for outcome in fetched.drain(..) {
                outcome.result.map_err(|error| self.error(error))?;
            }
            if let Located::Present(range) = self.blob.locate(self.offset, self.len) {
                return Ok(range);
            }
            count = count.next().map_err(|error| self.error(error))?;
        }
    }

    /// Creates the error of a request that waited for the range and whose fetch failed.
    pub fn error(&self, source: FetchError) -> Error {
        Error::Fetch {
            layer: self.blob.layer().clone(),
            offset: self.offset,
            expected: self.len,
            source,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    use std::thread;

    use super::*;
    use crate::source::LayerRef;

    const UNIT: u64 = 4096;

    const LEN: u64 = 15 * UNIT + 100;

    /// A blob of 16 units, one bit each, that a thread fetches when it is asked to.
    #[derive(Debug)]
    struct Units {
        file: File,
        present: AtomicU64,
        is_complete: AtomicBool,
        lookups: AtomicU64,
        refusal: Option<FetchErrorKind>,
        rejected: AtomicU64,
        ahead: Mutex<Vec<(u64, u64)>>,
    }

    impl Units {
        fn bits(offset: u64, len: u64) -> u64 {
            let (first, end) = (offset / UNIT, (offset + len).div_ceil(UNIT));
            ((1 << (end - first)) - 1) << first
        }

        fn fetch(&self, offset: u64, len: u64) {
            let start = offset / UNIT * UNIT;
            let end = (offset + len).next_multiple_of(UNIT).min(LEN);
            let bytes = vec![7; (end - start) as usize];
            self.file.write_all_at(&bytes, start).unwrap();
            self.present
                .fetch_or(Self::bits(offset, len), Ordering::Release);
        }
    }

    impl Presence for Arc<Units> {
        fn is_present(&self, offset: u64, len: u64) -> bool {
            self.lookups.fetch_add(1, Ordering::Relaxed);
            let bits = Units::bits(offset, len);
            self.present.load(Ordering::Acquire) & bits == bits
        }

        fn is_complete(&self) -> bool {
            self.is_complete.load(Ordering::Relaxed)
        }

        fn request(&self, offset: u64, len: u64, waker: &Arc<Waker>, ticket: Ticket) {
            let (units, waker) = (self.clone(), waker.clone());
            thread::spawn(move || match units.refusal {
                Some(FetchErrorKind::Timeout) => {}
                Some(kind) => waker.finish(ticket, Err(FetchError::new(kind, "refused"))),
                None => {
                    units.fetch(offset, len);
                    waker.finish(ticket, Ok(()));
                }
            });
        }

        fn fetch_ahead(&self, offset: u64, len: u64) {
            self.ahead.lock().unwrap().push((offset, len));
        }

        fn reject(&self, offset: u64, len: u64) -> bool {
            self.present
                .fetch_and(!Units::bits(offset, len), Ordering::Release);
            self.rejected.fetch_add(1, Ordering::Relaxed) < 1
        }

        fn patience(&self) -> Duration {
            Duration::from_secs(60)
        }
    }

    fn blob(refusal: Option<FetchErrorKind>) -> (Blob, Arc<Units>) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(LEN).unwrap();
        let units = Arc::new(Units {
            file: file.try_clone().unwrap(),
            present: AtomicU64::new(0),
            is_complete: AtomicBool::new(false),
            lookups: AtomicU64::new(0),
            refusal,
            rejected: AtomicU64::new(0),
            ahead: Mutex::default(),
        });
        let presence = Arc::new(units.clone());
        (
            Blob::partial(
                LayerRef::from(std::path::Path::new("blob")),
                file,
                LEN,
                presence,
            ),
            units,
        )
    }

    fn absent(blob: &Blob, offset: u64, len: usize) -> AbsentRange<'_> {
        match blob.locate(offset, len) {
            Located::Absent(range) => range,
            Located::Present(_) => panic!("{offset}+{len} is present"),
        }
    }

    #[test]
    fn a_range_is_present_when_all_of_it_is() {
        let (blob, units) = blob(None);
        units.fetch(2 * UNIT, 2 * UNIT);
        let present = |offset, len| matches!(blob.locate(offset, len), Located::Present(_));
        assert!(present(2 * UNIT, 2 * UNIT as usize));
        assert!(!present(2 * UNIT, 2 * UNIT as usize + 1));
        assert!(!present(2 * UNIT - 1, 2));
        // Reading beyond the end reports the end, whatever is asked for.
        assert!(!present(15 * UNIT, 1 << 20));
        units.fetch(15 * UNIT, 100);
        assert!(present(15 * UNIT, 1 << 20));
        assert!(present(u64::MAX, usize::MAX));
        let error = blob.read_exact_at(&mut [0; 101], 15 * UNIT).unwrap_err();
        assert!(matches!(error, Error::Short { .. }), "{error}");
    }

    #[test]
    fn a_blob_that_becomes_complete_is_looked_up_no_more() {
        let (blob, units) = blob(None);
        units.fetch(0, LEN);
        let lookups = |ranges: u64| {
            let before = units.lookups.load(Ordering::Relaxed);
            for unit in 0..ranges {
                let located = blob.locate(unit * UNIT, 1);
                assert!(matches!(located, Located::Present(_)));
            }
            units.lookups.load(Ordering::Relaxed) - before
        };
        assert_eq!(lookups(10), 10);
        units.is_complete.store(true, Ordering::Relaxed);
        assert_eq!(lookups(10), 1);
        assert_eq!(lookups(10), 0);
        assert_eq!(blob.local_bytes(), LEN);
        assert!(blob.reject(3 * UNIT, 1));
        absent(&blob, 3 * UNIT, 1);
        assert_eq!(lookups(3), 3, "rejected bytes must be found absent");
    }

    #[test]
    fn a_read_waits_for_absent_bytes() {
        let (blob, units) = blob(None);
        let mut buffer = [0; 100];
        blob.read_exact_at(&mut buffer, UNIT - 50).unwrap();
        assert_eq!(buffer, [7; 100]);
        assert_eq!(units.present.load(Ordering::Relaxed), 0b11);
        blob.map();
        assert_eq!(units.present.load(Ordering::Relaxed), 0b11 | 0b111 << 13);
        assert!(blob.resident_map().is_some());
    }

    #[test]
    fn a_read_ends_with_the_reason_or_at_the_deadline() {
        for kind in [FetchErrorKind::NotFound, FetchErrorKind::Timeout] {
            let (blob, _) = blob(Some(kind));
            let deadline = Instant::now() + Duration::from_millis(20);
            let error = absent(&blob, 0, 1).wait(deadline).unwrap_err();
            let Error::Fetch { source, .. } = error else {
                panic!("{error}")
            };
            assert_eq!(source.kind(), kind);
        }
    }

    #[test]
    fn the_descriptor_of_a_waker_is_readable_until_all_is_taken() {
        let (blob, _) = blob(None);
        let waker = Waker::new().unwrap();
        let mut fetched = Vec::new();
        for ticket in 0..8 {
            absent(&blob, ticket * UNIT, 1).request(&waker, Ticket(ticket));
        }
        while fetched.len() < 8 {
            poll(&mut [PollFd::new(&waker, PollFlags::IN)], None).unwrap();
            waker.take(&mut fetched);
        }
        let mut tickets: Vec<_> = fetched.iter().map(|outcome| outcome.ticket.0).collect();
        tickets.sort_unstable();
        assert_eq!(tickets, (0..8).collect::<Vec<_>>());
        let ready = poll(
            &mut [PollFd::new(&waker, PollFlags::IN)],
            Some(&Timespec::default()),
        );
        assert_eq!(ready, Ok(0));
    }

    #[test]
    fn rejected_bytes_are_fetched_again_and_hints_wait_for_nothing() {
        let (blob, units) = blob(None);
        absent(&blob, 0, 1).fetch_ahead();
        assert_eq!(*units.ahead.lock().unwrap(), [(0, 1)]);
        units.fetch(0, 1);
        assert!(blob.reject(0, 1));
        absent(&blob, 0, 1);
        assert!(!blob.reject(0, 1), "as often as it may be");
        let local = Blob::changing("local".as_ref(), tempfile::tempfile().unwrap()).unwrap();
        assert!(!local.reject(0, 1));
    }
}
