//! A queue worker over layers whose bytes are absent, and its driver.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};

use common::blk::{self, IN, OK};
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

use super::remote::{Behavior, Remote};

pub(super) const DISK: u64 = 4 << 20;
pub(super) const SIZE: u16 = 128;

/// The layers' files, and the disk's content.
pub(super) struct Layers {
    _folder: TempDir,
    pub(super) paths: [std::path::PathBuf; 2],
    pub(super) content: Vec<u8>,
}

/// A compressed layer of the whole disk, and a plain one above part of it.
pub(super) fn layers() -> &'static Layers {
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
pub(super) struct Setup {
    pub(super) readahead: u64,
    pub(super) drop_cache: bool,
    pub(super) pread: bool,
    pub(super) inflight: bool,
}

/// A worker over layers that are fetched, and its driver.
pub(super) struct Machine {
    pub(super) remotes: Vec<Arc<Remote>>,
    pub(super) context: ConnectionContext,
    /// The other end of the worker's connection.
    _front_end: UnixStream,
    pub(super) memory: Memory,
    pub(super) queue: Queue,
    pub(super) worker: Option<Worker>,
    pub(super) base: Option<u16>,
    pub(super) next: u64,
}

impl Machine {
    /// All bytes were fetched to open the image, and all but the ends of the layers are absent.
    pub(super) fn start(setup: Setup) -> Self {
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

    pub(super) fn start_worker(&mut self) {
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

    pub(super) fn stop_worker(&mut self, after: AfterStop) {
        let worker = self.worker.take().expect("a worker");
        match worker.stop(after) {
            Resume::At(next) => self.base = Some(next),
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn set(&self, behavior: Behavior) {
        self.remotes.iter().for_each(|remote| remote.set(behavior));
    }

    pub(super) fn waiting(&self) -> usize {
        self.remotes.iter().map(|remote| remote.waiting()).sum()
    }

    /// Delivers what waits, and what is asked for until nothing waits any more, in any order.
    pub(super) fn deliver_all(&self, random: &mut Random) {
        while self
            .remotes
            .iter()
            .any(|remote| remote.deliver(random.any()))
        {}
    }

    /// Submits a read. Its memory is its own.
    pub(super) fn read(&mut self, sector: u64, len: u32) -> Placed {
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

    pub(super) fn status(&self, placed: &Placed) -> u8 {
        self.memory.read(placed.status, 1)[0]
    }

    pub(super) fn assert_read(&self, placed: &Placed, sector: u64) {
        assert_eq!(self.status(placed), OK, "read at sector {sector}");
        let data = placed.data[0];
        let found = self.memory.read(data.address, data.len as usize);
        let start = sector as usize * 512;
        let expected = &layers().content[start..start + found.len()];
        let wrong = difference(&found, expected);
        assert_eq!(wrong, None, "{} bytes at sector {sector}", found.len());
    }

    /// Submits reads, publishes them and waits for the answers.
    pub(super) fn read_all(&mut self, reads: &[(u64, u32)]) {
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

pub(super) fn file(event: &EventFd) -> Arc<File> {
    let own = pidfd_open(getpid(), PidfdFlags::empty()).expect("this process");
    let copy = pidfd_getfd(own, event.as_raw_fd(), PidfdGetfdFlags::empty());
    Arc::new(File::from(copy.expect("descriptor")))
}

/// The memory as the worker sees it.
pub(super) fn shared(memory: &Memory) -> GuestMemory {
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

pub(super) fn inflight() -> Arc<InflightArea> {
    let queues = Queues {
        count: 1,
        size: SIZE,
    };
    let (file, len) = InflightArea::create(queues, queues).expect("in-flight area");
    let area = InflightArea::map(&file, 0, len, queues, queues);
    Arc::new(area.expect("in-flight area"))
}
