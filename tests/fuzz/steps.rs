//! Messages and chains of requests, put together as `fuzz_targets/messages.rs` reads them.

use super::requests;

/// Steps as `fuzz_targets/messages.rs` reads them.
#[derive(Default)]
pub(super) struct Steps(pub(super) Vec<u8>);

/// Descriptors of a message: how many, then the first (memory, in-flight area, log, kick, other, socket).
pub(super) const NO_FD: u8 = 0;
pub(super) const MEMORY: u8 = 0x01;
pub(super) const AREA: u8 = 0x11;
pub(super) const LOG: u8 = 0x21;
pub(super) const KICK: u8 = 0x31;
pub(super) const OTHER: u8 = 0x41;
pub(super) const SOCKET: u8 = 0x51;
pub(super) const USER: u64 = 0x7f00_0000_0000;

impl Steps {
    pub(super) fn message(mut self, request: u8, fds: u8, body: &[u64]) -> Self {
        let body = body.iter().flat_map(|word| word.to_le_bytes());
        let body: Vec<u8> = body.collect();
        self.0.extend([0, request, fds, 8, body.len() as u8]);
        self.0.extend(body);
        self
    }

    pub(super) fn memory(self) -> Self {
        let requests = requests().into_iter();
        requests.fold(self, |steps, (at, bytes)| steps.bytes(at, &bytes))
    }

    pub(super) fn bytes(mut self, at: u16, bytes: &[u8]) -> Self {
        for (part, bytes) in (0..).zip(bytes.chunks(255)) {
            let [low, high] = (at + 255 * part).to_le_bytes();
            self.0.extend([4, low, high, bytes.len() as u8]);
            self.0.extend(bytes);
        }
        self
    }

    /// SET_CONFIG of that byte: offset, length and flags, then the bytes.
    pub(super) fn set_writeback(mut self, writeback: u8) -> Self {
        let head = [32u32, 1, 0].map(u32::to_le_bytes);
        self.0.extend([0, 25, NO_FD, 8, 13]);
        self.0.extend(head.as_flattened());
        self.0.push(writeback);
        self
    }

    pub(super) fn kick(mut self) -> Self {
        self.0.extend([6, 0, 0]);
        self
    }

    pub(super) fn cut(mut self, file: u8, pages: u8) -> Self {
        self.0.extend([7, file, pages]);
        self
    }

    pub(super) fn negotiate(self) -> Self {
        self.negotiate_for(0)
    }

    /// With more features than a read-only device has.
    pub(super) fn negotiate_for(self, more: u64) -> Self {
        self.message(3, NO_FD, &[])
            .message(15, NO_FD, &[])
            // MQ, LOG_SHMFD, REPLY_ACK, CONFIG, INFLIGHT_SHMFD, RESET_DEVICE, memory slots, state
            .message(16, NO_FD, &[0x8b20b])
            .message(2, NO_FD, &[1 << 32 | 1 << 30 | 1 << 29 | 1 << 28 | more])
    }

    /// The same with a disk that can be written to, in the way of this number.
    pub(super) fn writable(mut self, way: u8) -> Self {
        self.0[0] += 0x80 + 0x20 * way;
        self
    }

    pub(super) fn table(self) -> Self {
        self.message(5, MEMORY, &[1, 0x10000, 0x10000, USER, 0])
    }

    pub(super) fn queue(self, index: u64, log: u64) -> Self {
        self.queue_of(8, index, log, 0)
    }

    pub(super) fn queue_of(self, size: u64, index: u64, log: u64, base: u64) -> Self {
        self.message(8, NO_FD, &[index | size << 32])
            .message(10, NO_FD, &[index | base << 32])
            .message(
                9,
                NO_FD,
                &[index | log << 32, USER + 0x200, USER + 0xC00, USER, 0x10C00],
            )
            .message(14, OTHER, &[index])
            .message(13, OTHER, &[index])
            .message(12, KICK, &[index])
            .message(18, NO_FD, &[index | 1 << 32])
    }
}

pub(super) const WRITE: u32 = 1;
pub(super) const FLUSH: u32 = 4;
pub(super) const GET_ID: u32 = 8;
pub(super) const DISCARD: u32 = 11;
pub(super) const WRITE_ZEROES: u32 = 13;
/// FLUSH, CONFIG_WCE, DISCARD and WRITE_ZEROES.
pub(super) const WRITABLE: u64 = 1 << 9 | 1 << 11 | 1 << 13 | 1 << 14;

/// Descriptors of a queue of 32 in the same places, and headers and lists of ranges from 0x1000 on.
#[derive(Default)]
pub(super) struct Chains {
    table: Vec<u8>,
    pub(super) heads: Vec<u16>,
    headers: Vec<u8>,
}

impl Chains {
    pub(super) fn descriptor(&mut self, at: usize, len: usize, write: bool, last: bool) {
        let next = self.table.len() as u64 / 16 + 1;
        let flags = u64::from(!last) | u64::from(write) << 1;
        let at = 0x10000 + at as u64;
        let rest = len as u64 | flags << 32 | next << 48;
        self.table.extend(at.to_le_bytes());
        self.table.extend(rest.to_le_bytes());
    }

    /// A request with so many bytes of data at 0x4000, for or by the device.
    pub(super) fn request(mut self, kind: u32, sector: u64, out: usize, back: usize) -> Self {
        self.heads.push(self.table.len() as u16 / 16);
        let at = 0x1000 + self.headers.len();
        self.headers.extend(u64::from(kind).to_le_bytes());
        self.headers.extend(sector.to_le_bytes());
        self.descriptor(at, 16, false, false);
        for (len, write) in [(out, false), (back, true)] {
            if len > 0 {
                self.descriptor(0x4000, len, write, false);
            }
        }
        self.descriptor(0x1800 + self.heads.len(), 1, true, true);
        self
    }

    /// A request with ranges: first sector, sectors, flags.
    pub(super) fn ranges(mut self, kind: u32, ranges: &[[u64; 3]]) -> Self {
        self.heads.push(self.table.len() as u16 / 16);
        let at = 0x1000 + self.headers.len();
        self.headers.extend(u64::from(kind).to_le_bytes());
        self.headers.extend([0; 8]);
        for [start, sectors, flags] in ranges {
            self.headers.extend(start.to_le_bytes());
            self.headers.extend((sectors | flags << 32).to_le_bytes());
        }
        self.descriptor(at, 16 + 16 * ranges.len(), false, false);
        self.descriptor(0x1800 + self.heads.len(), 1, true, true);
        self
    }

    /// Writes it all to memory, and makes as many available as the last parameter says.
    pub(super) fn lay(&self, steps: Steps, available: usize) -> Steps {
        let heads = self.heads.iter().copied().cycle().take(32);
        let ring = [0, available as u16].into_iter().chain(heads);
        let ring: Vec<u8> = ring.flat_map(u16::to_le_bytes).collect();
        steps
            .bytes(0, &ring)
            .bytes(0x200, &self.table)
            .bytes(0x1000, &self.headers)
            .bytes(0x1800, &[0xEE; 32])
    }
}

/// A request of every kind, those that others overtake among them.
pub(super) fn changes() -> Chains {
    Chains::default()
        .request(WRITE, 7, 4096, 0)
        .request(WRITE, 600, 1536, 0)
        .request(FLUSH, 0, 0, 0)
        .request(0, 0, 0, 8192)
        .ranges(DISCARD, &[[8, 4, 0], [599, 2, 0]])
        .ranges(WRITE_ZEROES, &[[0, 3, 1], [100, 5, 0]])
        .request(WRITE, 9, 512, 0)
        .request(GET_ID, 0, 0, 20)
        .request(FLUSH, 0, 0, 0)
        .request(0, 4, 0, 8192)
}
