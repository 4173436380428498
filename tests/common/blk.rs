//! virtio-blk requests (virtio 1.x, 5.2.6): a header the device reads, data, one status byte.

use virtio_bindings::virtio_blk as sys;

use super::memory::Memory;
use super::queue::Segment;

/// Bytes of a sector.
pub const SECTOR: u64 = 512;
/// Bytes of the header.
pub const HEADER: u32 = 16;

/// Read.
pub const IN: u32 = sys::VIRTIO_BLK_T_IN;
/// Write.
pub const OUT: u32 = sys::VIRTIO_BLK_T_OUT;
/// Flush.
pub const FLUSH: u32 = sys::VIRTIO_BLK_T_FLUSH;
/// Serial number.
pub const GET_ID: u32 = sys::VIRTIO_BLK_T_GET_ID;
/// Discard.
pub const DISCARD: u32 = sys::VIRTIO_BLK_T_DISCARD;
/// Write zeroes.
pub const WRITE_ZEROES: u32 = sys::VIRTIO_BLK_T_WRITE_ZEROES;

/// Done.
pub const OK: u8 = sys::VIRTIO_BLK_S_OK as u8;
/// Failed.
pub const IOERR: u8 = sys::VIRTIO_BLK_S_IOERR as u8;
/// Not known to the device.
pub const UNSUPP: u8 = sys::VIRTIO_BLK_S_UNSUPP as u8;
/// What a test puts in the status byte before: no status the device may write.
pub const UNANSWERED: u8 = 0xee;

/// A request header.
pub fn header(kind: u32, sector: u64) -> [u8; HEADER as usize] {
    let mut bytes = [0; HEADER as usize];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

/// A range of DISCARD or WRITE_ZEROES.
pub fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

/// The flag of a WRITE_ZEROES range that may give its space back.
pub const UNMAP: u32 = sys::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;

/// The fill of memory before a request: a byte that stays shows that it was not written.
pub const FILL: u8 = 0xa5;

/// Memory for one request at a time, handed out piece by piece from several regions.
///
/// It is filled with [`FILL`] before each request, so that afterwards everything outside of the
/// buffers the device may write can be checked to be as before.
#[derive(Debug)]
pub struct Scratch {
    memory: Memory,
    spans: Vec<Span>,
}

#[derive(Debug)]
struct Span {
    start: u64,
    len: u64,
    used: u64,
}

impl Scratch {
    /// `len` bytes in each region of `memory`.
    pub fn new(memory: &Memory, len: u64) -> Self {
        let span = |region: &std::sync::Arc<super::memory::Region>| Span {
            start: region.alloc(len, 4096),
            len,
            used: 0,
        };
        let mut scratch = Self {
            memory: memory.clone(),
            spans: memory.regions.iter().map(span).collect(),
        };
        scratch.clear();
        scratch
    }

    /// Takes everything back and fills it.
    pub fn clear(&mut self) {
        for span in &mut self.spans {
            self.memory
                .write(span.start, &vec![FILL; span.len as usize]);
            span.used = 0;
        }
    }

    /// Number of spans, each in a region of its own.
    pub fn spans(&self) -> u64 {
        self.spans.len() as u64
    }

    /// The guest address of `len` bytes in span `span`, `gap` bytes after what was taken last.
    pub fn take(&mut self, span: u64, len: u32, gap: u64) -> u64 {
        let span = &mut self.spans[span as usize];
        let start = span.used + gap;
        span.used = start + u64::from(len);
        assert!(span.used <= span.len, "scratch memory is used up");
        span.start + start
    }

    /// Takes the byte after a buffer, if the buffer is what was taken last in its span.
    pub fn take_after(&mut self, address: u64, len: u32) -> Option<u64> {
        let next = address + u64::from(len);
        let last = |span: &&mut Span| span.start + span.used == next && span.used < span.len;
        let span = self.spans.iter_mut().find(last)?;
        span.used += 1;
        self.memory.write(next, &[UNANSWERED]);
        Some(next)
    }

    /// Takes room for `bytes` in span `span` and writes them.
    pub fn put(&mut self, span: u64, bytes: &[u8], gap: u64) -> u64 {
        let address = self.take(span, bytes.len() as u32, gap);
        self.memory.write(address, bytes);
        address
    }

    /// Everything as it is now.
    pub fn snapshot(&self) -> Vec<Vec<u8>> {
        let read = |span: &Span| self.memory.read(span.start, span.len as usize);
        self.spans.iter().map(read).collect()
    }

    /// Asserts that since `before` nothing changed outside of `chain`'s writable buffers.
    pub fn assert_untouched(&self, before: &[Vec<u8>], chain: &[Segment]) {
        for (span, before) in self.spans.iter().zip(before) {
            let mut now = self.memory.read(span.start, span.len as usize);
            for segment in chain.iter().filter(|segment| segment.write) {
                let from = segment.address.max(span.start);
                let end = segment.address.saturating_add(segment.len.into());
                let to = end.min(span.start + span.len);
                if from < to {
                    let range = (from - span.start) as usize..(to - span.start) as usize;
                    now[range.clone()].copy_from_slice(&before[range]);
                }
            }
            let changed = super::content::difference(&now, before);
            assert_eq!(
                changed, None,
                "memory outside of the request's buffers was written"
            );
        }
    }
}
