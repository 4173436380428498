//! Reads of bytes that are absent: the worker asks for them, goes on, and serves them once they are
//! there. No zeros of a hole are ever served for them.

mod remote;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Instant;

use common::PATIENCE;
use common::blk::{self, IN, IOERR, OK};
use common::content::{Random, difference};
use common::guest::Placed;
use common::layers::{LayerBuilder, Pack, noise, write, zfile};
use common::memory::Memory;
use common::queue::{Layout, Queue, Segment};
use ovbd_vhost::engine::ring::Rings;
use ovbd_vhost::engine::setup::{AfterStop, ConnectionContext, Eventfds, QueueSetup};
use ovbd_vhost::engine::worker::{Resume, Worker};
use ovbd_vhost::engine::{BackendOptions, BlockBackend, Tuning};
use ovbd_vhost::image::config::Stack;
use ovbd_vhost::image::reader::Reader;
use ovbd_vhost::image::{Image, OpenStack};
use ovbd_vhost::units::Sector;
use ovbd_vhost::virtio::inflight::{InflightArea, Queues};
use ovbd_vhost::virtio::memory::{Memory as GuestMemory, RegionInfo};
use ovbd_vhost::virtio::queue::RingAddresses;
use ovbd_vhost::writable::{OnFull, Volume};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use tempfile::TempDir;
use vmm_sys_util::eventfd::EventFd;

use remote::{Behavior, Remote};

const DISK: u64 = 4 << 20;
const SIZE: u16 = 128;

/// The layers' files, and the disk's content.
struct Layers {
    _folder: TempDir,
    paths: [std::path::PathBuf; 2],
    content: Vec<u8>,
}

/// A compressed layer of the whole disk, and a plain one above part of it.
fn layers() -> &'static Layers {
    static LAYERS: OnceLock<Layers> = OnceLock::new();
    LAYERS.get_or_init(|| {
        let folder = TempDir::new().expect("folder");
        let lower = LayerBuilder::new(DISK).data(0, &noise(1, DISK as usize));
        let upper = LayerBuilder::new(DISK)
            .data(1001, &noise(2, 512 << 10))
            .zeroed(4000, 100)
            .data(6000, &noise(3, 300 << 10));
        let lower = zfile(&lower.lsmt(), Pack::default());
        let paths = [
            write(folder.path(), "lower", &lower),
            write(folder.path(), "upper", &upper.lsmt()),
        ];
        let image = Image::open(&Stack::new(&paths)).expect("layers");
        let mut content = vec![0; DISK as usize];
        let read = Reader::new().read(image.at_own_size(), Sector(0), &mut content);
        read.expect("content");
        Layers {
            _folder: folder,
            paths,
            content,
        }
    })
}

/// How a machine differs from the usual one.
#[derive(Clone, Copy, Default)]
struct Setup {
    readahead: u64,
    drop_cache: bool,
    pread: bool,
    inflight: bool,
}

/// A worker over layers that are fetched, and its driver.
struct Machine {
    remotes: Vec<Arc<Remote>>,
    context: ConnectionContext,
    /// The other end of the worker's connection.
    _front_end: UnixStream,
    memory: Memory,
    queue: Queue,
    worker: Option<Worker>,
    base: Option<u16>,
    next: u64,
}

impl Machine {
    /// All bytes were fetched to open the image, and all but the ends of the layers are absent.
    fn start(setup: Setup) -> Self {
        let remote = |path: &std::path::PathBuf| Remote::new(path);
        let (remotes, blobs): (Vec<_>, Vec<_>) = layers().paths.iter().map(remote).unzip();
        let image = Image::load(OpenStack::of(blobs).expect("blobs")).expect("image");
        remotes.iter().for_each(|remote| remote.forget(|_| true));
        let options = BackendOptions {
            queues: 1,
            queue_size: SIZE,
            serial: [7; 20],
            block_cache: 0,
            on_full: OnFull::Error,
            tuning: Tuning {
                readahead: setup.readahead,
                drop_cache: setup.drop_cache,
                ..Tuning::default()
            },
            limits: Default::default(),
            stats: ovbd_vhost::engine::stats::StatsPage::anonymous().expect("statistics page"),
        };
        let volume = Arc::new(Volume::read_only(image));
        let (rings, _) = Rings::make(usize::from(!setup.pread));
        let memory = Memory::typical();
        let (front_end, hangup) = UnixStream::pair().expect("connection");
        let mut machine = Self {
            remotes,
            context: ConnectionContext {
                backend: Arc::new(BlockBackend::new(volume, options, rings)),
                memory: Arc::new(shared(&memory)),
                inflight: setup.inflight.then(inflight),
                features: 1 << 28 | 1 << 29 | 1 << 32,
                hangup: Arc::new(hangup),
            },
            _front_end: front_end,
            queue: Queue::new(&memory, SIZE, true),
            memory,
            worker: None,
            base: Some(0),
            next: 0,
        };
        machine.start_worker();
        machine
    }

    fn start_worker(&mut self) {
        let vring = &self.queue.ring.vring;
        let guest = |user| self.context.memory.user_to_guest(user).expect("ring");
        let setup = QueueSetup {
            index: 0,
            size: SIZE,
            rings: RingAddresses {
                descriptors: guest(vring.at.descriptors),
                available: guest(vring.at.available),
                used: guest(vring.at.used),
                used_log: None,
            },
            base: self.base,
            eventfds: Eventfds {
                kick: Some(file(&vring.kick)),
                call: Some(file(&vring.call)),
                error: Some(file(&vring.err)),
                ..Eventfds::default()
            },
        };
        vring.kick.write(1).expect("kick");
        self.worker = Some(Worker::start(setup, self.context.clone()).expect("worker"));
    }

    fn stop_worker(&mut self, after: AfterStop) {
        let worker = self.worker.take().expect("a worker");
        match worker.stop(after) {
            Resume::At(next) => self.base = Some(next),
            other => panic!("{other:?}"),
        }
    }

    fn set(&self, behavior: Behavior) {
        self.remotes.iter().for_each(|remote| remote.set(behavior));
    }

    fn waiting(&self) -> usize {
        self.remotes.iter().map(|remote| remote.waiting()).sum()
    }

    /// Delivers what waits, and what is asked for until nothing waits any more, in any order.
    fn deliver_all(&self, random: &mut Random) {
        while self
            .remotes
            .iter()
            .any(|remote| remote.deliver(random.any()))
        {}
    }

    /// Submits a read. Its memory is its own.
    fn read(&mut self, sector: u64, len: u32) -> Placed {
        let region = &self.memory.regions[self.next as usize % 4];
        self.next += 1;
        let header = region.alloc(16, 16);
        let data = region.alloc(len.into(), 512);
        let status = region.alloc(1, 1);
        self.memory.write(header, &blk::header(IN, sector));
        self.memory.write(data, &vec![blk::FILL; len as usize]);
        self.memory.write(status, &[blk::UNANSWERED]);
        let placed = Placed {
            chain: vec![
                Segment::readable(header, 16),
                Segment::writable(data, len),
                Segment::writable(status, 1),
            ],
            data: vec![Segment::writable(data, len)],
            status,
        };
        self.queue.submit(&placed.chain, Layout::Indirect);
        placed
    }

    fn status(&self, placed: &Placed) -> u8 {
        self.memory.read(placed.status, 1)[0]
    }

    fn assert_read(&self, placed: &Placed, sector: u64) {
        assert_eq!(self.status(placed), OK, "read at sector {sector}");
        let data = placed.data[0];
        let found = self.memory.read(data.address, data.len as usize);
        let start = sector as usize * 512;
        let expected = &layers().content[start..start + found.len()];
        let wrong = difference(&found, expected);
        assert_eq!(wrong, None, "{} bytes at sector {sector}", found.len());
    }

    /// Submits reads, publishes them and waits for the answers.
    fn read_all(&mut self, reads: &[(u64, u32)]) {
        let placed: Vec<_> = reads
            .iter()
            .map(|(sector, len)| self.read(*sector, *len))
            .collect();
        self.queue.publish();
        for _ in reads {
            self.queue.wait();
        }
        for (placed, (sector, _)) in placed.iter().zip(reads) {
            self.assert_read(placed, *sector);
        }
    }
}

fn file(event: &EventFd) -> Arc<File> {
    let own = pidfd_open(getpid(), PidfdFlags::empty()).expect("this process");
    let copy = pidfd_getfd(own, event.as_raw_fd(), PidfdGetfdFlags::empty());
    Arc::new(File::from(copy.expect("descriptor")))
}

/// The memory as the worker sees it.
fn shared(memory: &Memory) -> GuestMemory {
    memory
        .regions
        .iter()
        .fold(GuestMemory::default(), |shared, region| {
            let info = region.info();
            let info = RegionInfo {
                guest: info.guest_phys_addr,
                len: info.memory_size,
                user: info.userspace_addr,
                file_offset: info.mmap_offset,
            };
            let file = region.file().try_clone().expect("descriptor");
            shared.with_region(info, file).expect("region")
        })
}

fn inflight() -> Arc<InflightArea> {
    let queues = Queues {
        count: 1,
        size: SIZE,
    };
    let (file, len) = InflightArea::create(queues, queues).expect("in-flight area");
    let area = InflightArea::map(&file, 0, len, queues, queues);
    Arc::new(area.expect("in-flight area"))
}

/// Reads of any place and length, as many as a queue holds.
fn random_reads(random: &mut Random, count: u64) -> Vec<(u64, u32)> {
    let sectors = DISK / 512;
    let read = |_| {
        let most = if random.below(8) == 0 { 256 } else { 16 };
        let len = random.within(1..=most);
        (random.below(sectors - len), len as u32 * 512)
    };
    (0..count).map(read).collect()
}

/// Sectors of 100 reads, more than are fetched at a time, of bytes that are stored and far apart.
fn cold_sectors() -> Vec<u64> {
    (0..100).map(|read| 4200 + read * 39).collect()
}

/// Any presence, any order of arrival: every read is answered, and right.
#[test]
fn reads_are_right_whatever_is_present() {
    let setups = [
        Setup::default(),
        Setup {
            pread: true,
            ..Setup::default()
        },
        Setup {
            readahead: 256 << 10,
            drop_cache: true,
            ..Setup::default()
        },
    ];
    for (seed, setup) in (0..).zip(setups) {
        let mut random = Random::new(seed);
        let mut machine = Machine::start(setup);
        for round in 0..40u64 {
            // Nothing is read while bytes are forgotten: a hole is then a hole for every reader.
            for remote in &machine.remotes {
                let share = [0, 1, 4, 16][random.below(4) as usize];
                remote.forget(|_| random.below(16) < share);
            }
            let behavior = match round % 4 {
                0 => Behavior::AtOnce,
                _ => Behavior::Hold,
            };
            machine.set(behavior);
            let reads = random_reads(&mut random, 60);
            let done = AtomicBool::new(false);
            let (remotes, seed) = (machine.remotes.clone(), random.any());
            thread::scope(|scope| {
                scope.spawn(|| {
                    let mut random = Random::new(seed);
                    while !done.load(Ordering::Relaxed) {
                        let remote = &remotes[random.below(2) as usize];
                        if !remote.deliver(random.any()) {
                            thread::yield_now();
                        }
                    }
                });
                let stop = Stop(&done);
                machine.read_all(&reads);
                drop(stop);
            });
            assert_eq!(machine.waiting(), 0);
            // The memory of the reads is used again.
            machine.memory = Memory::typical();
            machine.stop_worker(AfterStop::Stop);
            machine.queue = Queue::new(&machine.memory, SIZE, true);
            machine.context.memory = Arc::new(shared(&machine.memory));
            machine.base = Some(0);
            machine.start_worker();
        }
    }
}

struct Stop<'f>(&'f AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn reads_of_present_bytes_overtake_those_that_wait() {
    let mut machine = Machine::start(Setup::default());
    machine.read_all(&[(0, 4096)]);
    machine.set(Behavior::Hold);
    let sectors = cold_sectors();
    let cold: Vec<_> = sectors
        .iter()
        .map(|sector| machine.read(*sector, 512))
        .collect();
    machine.queue.publish();
    while machine.waiting() < 64 {
        thread::yield_now();
    }
    for _ in 0..50 {
        let warm = machine.read(3, 2048);
        machine.queue.publish();
        machine.queue.wait();
        machine.assert_read(&warm, 3);
    }
    assert!(
        cold.iter()
            .all(|read| machine.status(read) == blk::UNANSWERED)
    );
    machine.set(Behavior::AtOnce);
    let mut random = Random::new(9);
    machine.deliver_all(&mut random);
    for _ in &cold {
        machine.queue.wait();
    }
    for (read, sector) in cold.iter().zip(sectors) {
        machine.assert_read(read, sector);
    }
}

#[test]
fn a_fetch_that_fails_fails_its_read_alone() {
    let mut machine = Machine::start(Setup::default());
    machine.read_all(&[(0, 4096)]);
    for behavior in [Behavior::Refuse, Behavior::Lie] {
        machine.set(behavior);
        let (cold, warm) = (machine.read(2000, 65536), machine.read(0, 4096));
        machine.queue.publish();
        for _ in 0..2 {
            machine.queue.wait();
        }
        assert_eq!(machine.status(&cold), IOERR, "{behavior:?}");
        machine.assert_read(&warm, 0);
    }
    machine.set(Behavior::AtOnce);
    machine.read_all(&[(2000, 65536)]);
}

#[test]
fn damaged_bytes_are_fetched_again_and_then_fail() {
    let mut machine = Machine::start(Setup::default());
    // A compressed block, which has a checksum.
    machine.set(Behavior::Damage(2));
    machine.read_all(&[(8000, 4096)]);
    machine.set(Behavior::Damage(100));
    let damaged = machine.read(7000, 4096);
    machine.queue.publish();
    machine.queue.wait();
    assert_eq!(machine.status(&damaged), IOERR);
    machine.set(Behavior::AtOnce);
    machine.read_all(&[(8000, 4096)]);
}

#[test]
fn what_comes_next_is_fetched_ahead() {
    let mut machine = Machine::start(Setup {
        readahead: 1 << 20,
        ..Setup::default()
    });
    for read in 0..8 {
        machine.read_all(&[(read * 8, 4096)]);
    }
    let ahead = machine.remotes[0].ahead.load(Ordering::Relaxed);
    assert!(ahead > 0, "a reader in order is fetched ahead for");
}

/// A queue that stops does not wait for the network; what is open then is done by the next worker.
#[test]
fn reads_that_wait_while_the_queue_stops_are_done_by_the_next_worker() {
    let mut machine = Machine::start(Setup {
        inflight: true,
        ..Setup::default()
    });
    machine.read_all(&[(0, 4096)]);
    machine.set(Behavior::Hold);
    let sectors = cold_sectors();
    let cold: Vec<_> = sectors
        .iter()
        .map(|sector| machine.read(*sector, 9 * 512))
        .collect();
    machine.queue.publish();
    while machine.waiting() < 64 {
        thread::yield_now();
    }
    // A front-end may change its eventfds and memory many times meanwhile.
    let start = Instant::now();
    for _ in 0..30 {
        machine.stop_worker(AfterStop::Restart);
        machine.start_worker();
    }
    assert!(start.elapsed() < PATIENCE, "each restart waits");
    machine.stop_worker(AfterStop::Stop);
    assert!(
        cold.iter()
            .all(|read| machine.status(read) == blk::UNANSWERED)
    );
    machine.set(Behavior::AtOnce);
    machine.start_worker();
    for _ in &cold {
        machine.queue.wait();
    }
    for (read, sector) in cold.iter().zip(sectors) {
        machine.assert_read(read, sector);
    }
    // What was asked for in vain wakes a worker that is gone.
    machine.deliver_all(&mut Random::new(1));
    machine.read_all(&[(0, 4096), (3000, 65536)]);
}

#[test]
fn reads_that_wait_while_the_queue_stops_fail_without_an_in_flight_region() {
    let mut machine = Machine::start(Setup::default());
    machine.read_all(&[(0, 4096)]);
    machine.set(Behavior::Hold);
    let cold = machine.read(2000, 65536);
    machine.queue.publish();
    while machine.waiting() == 0 {
        thread::yield_now();
    }
    machine.stop_worker(AfterStop::Stop);
    machine.queue.wait();
    assert_eq!(machine.status(&cold), IOERR);
    machine.set(Behavior::AtOnce);
    machine.start_worker();
    machine.read_all(&[(2000, 65536)]);
}
