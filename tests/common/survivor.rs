//! A guest that connects again whenever its back-end ends. Each request is answered once, and every sector that is read
//! holds what was written last.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::PATIENCE;
use super::blk::{self, SECTOR, Scratch};
use super::content::{Random, tagged};
use super::memory::Memory;
use super::queue::{Layout, Queue, Segment};
use super::returning::Returning;
use super::session::Session;

/// Sectors that it writes to; the others are left.
const SECTORS: u64 = 512;

/// Most sectors of a request.
const MOST: u64 = 16;

/// A connection, and a second handle on it.
struct Connection {
    _session: Session,
    stream: UnixStream,
}

/// A guest of a writable disk.
pub struct Survivor {
    path: PathBuf,
    front_end: Returning,
    connection: Option<Connection>,
    queue: Queue,
    scratch: Scratch,
    memory: Memory,
    random: Random,
    /// Seed of the content of each sector; 0: never written.
    written: Vec<u64>,
    /// Connections after the first.
    pub reconnects: u64,
}

impl Survivor {
    /// A guest of the disk at `path`, whose first sectors read as zeros.
    pub fn start(path: PathBuf, seed: u64) -> Self {
        let memory = Memory::typical();
        let queue = Queue::new(&memory, 16, true);
        let front_end = Returning::new(memory.clone(), vec![queue.ring.vring.clone()]);
        let mut survivor = Self {
            path,
            front_end,
            connection: None,
            queue,
            scratch: Scratch::new(&memory, 64 << 10),
            memory,
            random: Random::new(seed),
            written: vec![0; SECTORS as usize],
            reconnects: 0,
        };
        survivor.connect();
        survivor
    }

    /// Connects, and tries again until a back-end serves.
    fn connect(&mut self) {
        self.connection = None;
        let start = Instant::now();
        loop {
            let connected = UnixStream::connect(&self.path).ok().and_then(|stream| {
                let other = stream.try_clone().expect("socket");
                let session = self.front_end.try_connect(stream).ok()?;
                Some(Connection {
                    _session: session,
                    stream: other,
                })
            });
            if connected.is_some() {
                self.connection = connected;
                return;
            }
            assert!(
                start.elapsed() < PATIENCE,
                "no back-end serves {}",
                self.path.display()
            );
            thread::sleep(Duration::from_millis(2));
        }
    }

    fn is_connected(&self) -> bool {
        self.connection.as_ref().is_some_and(|connection| {
            let mut stream = [PollFd::new(&connection.stream, PollFlags::RDHUP)];
            poll(&mut stream, Some(&Timespec::default())).expect("poll") == 0
        })
    }

    /// Does a request to its end, over as many connections as it takes; returns its data.
    fn request(&mut self, kind: u32, sector: u64, data: &[u8]) -> Vec<u8> {
        let (memory, len) = (self.memory.clone(), data.len() as u32);
        self.scratch.clear();
        let header = self.scratch.put(0, &blk::header(kind, sector), 0);
        let buffer = self.scratch.put(1, data, 0);
        let status = self.scratch.put(3, &[blk::UNANSWERED], 0);
        let mut chain = vec![Segment::readable(header, blk::HEADER)];
        match (kind, len) {
            (_, 0) => {}
            (blk::IN, _) => chain.push(Segment::writable(buffer, len)),
            _ => chain.push(Segment::readable(buffer, len)),
        }
        chain.push(Segment::writable(status, 1));
        self.queue.submit(&chain, Layout::Direct);
        self.queue.publish();
        let start = Instant::now();
        while self.queue.take().is_none() {
            if !self.is_connected() {
                self.connect();
                self.reconnects += 1;
            }
            assert!(
                start.elapsed() < PATIENCE,
                "no answer from {}",
                self.path.display()
            );
            self.queue.ring.want_no_call();
            thread::sleep(Duration::from_micros(200));
        }
        assert_eq!(
            memory.read(status, 1),
            [blk::OK],
            "request {kind} at {sector}"
        );
        memory.read(buffer, len as usize)
    }

    /// Reads a few sectors and compares them, or writes, or flushes.
    pub fn step(&mut self) {
        let count = self.random.within(1..=MOST);
        let sector = self.random.below(SECTORS - count);
        match self.random.below(8) {
            0 => drop(self.request(blk::FLUSH, 0, &[])),
            1..=3 => {
                let seed = self.random.any() | 1;
                let bytes: Vec<u8> = (0..count).flat_map(|at| content(seed + 2 * at)).collect();
                self.request(blk::OUT, sector, &bytes);
                for at in 0..count {
                    self.written[(sector + at) as usize] = seed + 2 * at;
                }
            }
            _ => self.check(sector, count),
        }
    }

    /// Reads all sectors and compares them.
    pub fn check_all(&mut self) {
        for sector in (0..SECTORS).step_by(MOST as usize) {
            self.check(sector, MOST);
        }
    }

    fn check(&mut self, sector: u64, count: u64) {
        let found = self.request(blk::IN, sector, &vec![0xEE; (count * SECTOR) as usize]);
        for (at, bytes) in (sector..).zip(found.chunks(SECTOR as usize)) {
            let expected = content(self.written[at as usize]);
            assert!(bytes == expected, "sector {at} of {}", self.path.display());
        }
    }
}

/// Content of a sector.
fn content(seed: u64) -> Vec<u8> {
    match seed {
        0 => vec![0; SECTOR as usize],
        seed => tagged(SECTOR as usize, seed),
    }
}
