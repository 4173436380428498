//! A session with memory and queues, ready to read.

use std::os::unix::net::UnixStream;

use vhost::Result;

use super::blk::{self, SECTOR, Scratch};
use super::memory::Memory;
use super::queue::{Layout, Queue, Segment, Waiting};
use super::ring::Used;
use super::session::{Session, Wanted, feature};

/// What a guest is made of.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Number of queues.
    pub queues: usize,
    /// Entries of each.
    pub queue_size: u16,
    /// Features to ask for.
    pub wanted: Wanted,
    /// How answers are waited for.
    pub waiting: Waiting,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            queues: 1,
            queue_size: 128,
            wanted: Wanted::all(),
            waiting: Waiting::Called,
        }
    }
}

/// A session with memory and queues.
pub struct Guest {
    /// The connection.
    pub session: Session,
    /// Its memory.
    pub memory: Memory,
    /// Its queues, running.
    pub queues: Vec<Queue>,
    /// Memory for requests.
    pub scratch: Scratch,
}

/// What the device did with one request.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// The status byte.
    pub status: u8,
    /// Bytes the used ring says were written.
    pub len: u32,
    /// The data buffers, in order.
    pub data: Vec<u8>,
}

/// A request laid out in scratch memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Its descriptors' buffers.
    pub chain: Vec<Segment>,
    /// Where its data lie, in order.
    pub data: Vec<Segment>,
    /// Where its status lies.
    pub status: u64,
}

impl Guest {
    /// Negotiates over `stream`, shares memory and starts the queues.
    pub fn boot(stream: UnixStream, options: Options) -> Result<Self> {
        let session = Session::negotiate(stream, options.wanted)?;
        let memory = Memory::typical();
        session.share(&memory)?;
        let event_idx = session.has(feature::EVENT_IDX);
        let queue = |_| {
            let mut queue = Queue::new(&memory, options.queue_size, event_idx);
            queue.waiting = options.waiting;
            queue
        };
        let mut guest = Self {
            queues: (0..options.queues).map(queue).collect(),
            scratch: Scratch::new(&memory, 512 << 10),
            session,
            memory,
        };
        for index in 0..options.queues {
            guest.start_queue(index)?;
        }
        Ok(guest)
    }

    /// Starts queue `index` where its driver stands, and kicks it, as QEMU does.
    pub fn start_queue(&mut self, index: usize) -> Result<()> {
        let ring = &self.queues[index].ring;
        self.session.start_queue(index, &ring.vring, ring.taken())?;
        ring.vring.kick.write(1).expect("kick");
        Ok(())
    }

    /// Stops queue `index`, empties it and starts it again: a driver that resets the device.
    pub fn reset_queue(&mut self, index: usize) -> Result<()> {
        self.session.stop_queue(index)?;
        self.queues[index].reset();
        self.start_queue(index)
    }

    /// Lays out a plain request in fresh scratch memory: header, data in one piece, status.
    pub fn place(&mut self, kind: u32, sector: u64, len: u32) -> Placed {
        self.scratch.clear();
        let header = self.scratch.put(0, &blk::header(kind, sector), 0);
        let data = Segment {
            address: self.scratch.take(1, len, 0),
            len,
            write: kind != blk::OUT && kind != blk::DISCARD && kind != blk::WRITE_ZEROES,
        };
        let status = self.scratch.put(3, &[blk::UNANSWERED], 0);
        let data = if len == 0 { vec![] } else { vec![data] };
        let mut chain = vec![Segment::readable(header, blk::HEADER)];
        chain.extend(&data);
        chain.push(Segment::writable(status, 1));
        Placed {
            chain,
            data,
            status,
        }
    }

    /// Lays out a request that carries `data`, as [`Guest::place`] does.
    pub fn place_data(&mut self, kind: u32, sector: u64, data: &[u8]) -> Placed {
        let placed = self.place(kind, sector, data.len() as u32);
        if let Some(segment) = placed.data.first() {
            self.memory.write(segment.address, data);
        }
        placed
    }

    /// Runs a request that carries `data` on queue `index`; returns its status.
    pub fn send(&mut self, index: usize, kind: u32, sector: u64, data: &[u8]) -> u8 {
        let placed = self.place_data(kind, sector, data);
        let answer = self.run(index, &placed, Layout::Direct);
        assert_eq!(answer.len, 1, "only the status is written");
        answer.status
    }

    /// Writes `data` at `sector` through queue `index`.
    pub fn write(&mut self, index: usize, sector: u64, data: &[u8]) {
        let status = self.send(index, blk::OUT, sector, data);
        assert_eq!(
            status,
            blk::OK,
            "write of {} bytes at sector {sector}",
            data.len()
        );
    }

    /// Makes what was written durable.
    pub fn flush(&mut self, index: usize) {
        assert_eq!(self.send(index, blk::FLUSH, 0, &[]), blk::OK, "flush");
    }

    /// What `used` and the memory say about a request.
    pub fn answer(&self, placed: &Placed, used: Used) -> Answer {
        let read = |part: &Segment| self.memory.read(part.address, part.len as usize);
        Answer {
            status: self.memory.read(placed.status, 1)[0],
            len: used.len,
            data: placed.data.iter().flat_map(read).collect(),
        }
    }

    /// Runs a placed request alone on queue `index`, and checks that nothing else was written.
    pub fn run(&mut self, index: usize, placed: &Placed, layout: Layout) -> Answer {
        let before = self.scratch.snapshot();
        let used = self.queues[index].run(&placed.chain, layout);
        self.scratch.assert_untouched(&before, &placed.chain);
        self.answer(placed, used)
    }

    /// Runs a plain request on queue `index`.
    pub fn request(&mut self, index: usize, kind: u32, sector: u64, len: u32) -> Answer {
        let placed = self.place(kind, sector, len);
        self.run(index, &placed, Layout::Direct)
    }

    /// Reads `len` bytes at `sector` through queue `index`.
    pub fn read(&mut self, index: usize, sector: u64, len: u32) -> Vec<u8> {
        let answer = self.request(index, blk::IN, sector, len);
        assert_eq!(
            answer.status,
            blk::OK,
            "read of {len} bytes at sector {sector}"
        );
        assert_eq!(
            answer.len,
            len + 1,
            "bytes written: the data and the status"
        );
        answer.data
    }

    /// Asserts that queue `index` reads the disk right, here and there.
    pub fn assert_reads(&mut self, index: usize, expected: &[u8]) {
        let sectors = expected.len() as u64 / SECTOR;
        for sector in [0, sectors / 3, sectors - 1] {
            let len = (sectors - sector).min(9) * SECTOR;
            let start = (sector * SECTOR) as usize;
            let found = self.read(index, sector, len as u32);
            let wrong = super::content::difference(&found, &expected[start..start + len as usize]);
            assert_eq!(wrong, None, "queue {index}, {len} bytes at sector {sector}");
        }
    }
}
