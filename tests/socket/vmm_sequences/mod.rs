//! The messages each VMM sends, in its order, and then reads that must be right.
//!
//! The orders are those of Cloud Hypervisor 53, QEMU 7.2 and 10.0, Firecracker 1.13 and Dragonball
//! (in Kata Containers 3), read from their sources.

mod cloud_hypervisor;
mod dragonball;
mod firecracker;
mod inflight_areas;
mod qemu;

use std::os::fd::AsRawFd;

use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserInflight};
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures as Protocol};

use common::blk::{self, IN, OK};
use common::content::difference;
use common::disk::Disk;
use common::guest::{Options, Placed};
use common::memory::Memory;
use common::queue::{Layout, Queue, Segment};
use common::session::{addresses, ask_for_replies, feature, frontend};

/// Bytes of the config space every VMM asks for.
const CONFIG: u32 = 60;

/// What every VMM does with the disk.
trait Vmm {
    fn connect(&self) -> Frontend;
    fn assert_config(&self, frontend: &mut Frontend, offset: u32);
    fn assert_reads(&self, memory: &Memory, queue: &mut Queue, buffers: &Buffers);
    fn assert_data(&self, memory: &Memory, placed: &Placed, sector: u64);
}

impl Vmm for Disk {
    fn connect(&self) -> Frontend {
        frontend(self.daemon.connect())
    }

    /// GET_CONFIG as every VMM sends it; the capacity must be the disk's.
    fn assert_config(&self, frontend: &mut Frontend, offset: u32) {
        let buffer = [0; CONFIG as usize];
        let flags = VhostUserConfigFlags::WRITABLE;
        let (header, bytes) = frontend
            .get_config(offset, CONFIG, flags, &buffer)
            .expect("config space");
        assert_eq!(
            ({ header.offset }, { header.size }, bytes.len()),
            (offset, CONFIG, 60)
        );
        let capacity = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
        assert_eq!(capacity, self.sectors());
    }

    /// Reads here and there through `queue`, one request at a time.
    fn assert_reads(&self, memory: &Memory, queue: &mut Queue, buffers: &Buffers) {
        let sectors = self.sectors();
        for sector in [0, 1, sectors / 2, sectors - 8] {
            let placed = buffers.place(memory, 0, sector);
            let used = queue.run(&placed.chain, Layout::Direct);
            assert_eq!(used.len, BUFFER + 1);
            self.assert_data(memory, &placed, sector);
        }
    }

    fn assert_data(&self, memory: &Memory, placed: &Placed, sector: u64) {
        assert_eq!(memory.read(placed.status, 1), [OK], "sector {sector}");
        let data = memory.read(placed.data[0].address, BUFFER as usize);
        let wrong = difference(&data, self.expected(sector, BUFFER));
        assert_eq!(wrong, None, "sector {sector}");
    }
}

const BUFFER: u32 = 4096;

/// Room for eight requests at once.
struct Buffers(u64);

impl Buffers {
    fn new(memory: &Memory) -> Self {
        Self(memory.regions[1].alloc(8 * 8192, 4096))
    }

    fn place(&self, memory: &Memory, slot: u64, sector: u64) -> Placed {
        let start = self.0 + 8192 * slot;
        let (header, status) = (start + 4096, start + 4200);
        memory.write(start, &[blk::FILL; BUFFER as usize]);
        memory.write(header, &blk::header(IN, sector));
        memory.write(status, &[blk::UNANSWERED]);
        let data = Segment::writable(start, BUFFER);
        let chain = vec![
            Segment::readable(header, blk::HEADER),
            data,
            Segment::writable(status, 1),
        ];
        Placed {
            chain,
            data: vec![data],
            status,
        }
    }
}

/// SET_MEM_TABLE with all regions.
fn share(frontend: &Frontend, memory: &Memory) {
    let regions: Vec<_> = memory.regions.iter().map(|region| region.info()).collect();
    frontend.set_mem_table(&regions).expect("memory");
}

/// What Cloud Hypervisor and QEMU pass on to a guest, of what is offered.
const GUEST_FEATURES: u64 = feature::SIZE_MAX
    | feature::SEG_MAX
    | feature::RO
    | feature::BLK_SIZE
    | feature::FLUSH
    | feature::TOPOLOGY
    | feature::CONFIG_WCE
    | feature::DISCARD
    | feature::WRITE_ZEROES
    | feature::MQ
    | feature::INDIRECT
    | feature::EVENT_IDX
    | feature::VERSION_1
    | feature::PROTOCOL
    | feature::LOG_ALL;

fn queues(memory: &Memory, count: usize, size: u16, acked: u64) -> Vec<Queue> {
    let event_idx = acked & feature::EVENT_IDX != 0;
    (0..count)
        .map(|_| Queue::new(memory, size, event_idx))
        .collect()
}

/// A front-end of the time before protocol features: rings run once they are kicked, without
/// SET_VRING_ENABLE (vhost-user, "Ring states").
#[test]
fn a_front_end_without_protocol_features() {
    let disk = Disk::serve();
    let memory = Memory::typical();
    let buffers = Buffers::new(&memory);
    let frontend = disk.connect();
    frontend.set_owner().expect("owner");
    let offered = frontend.get_features().expect("features");
    let acked = offered & (feature::VERSION_1 | feature::EVENT_IDX | feature::INDIRECT);
    frontend.set_features(acked).expect("features");
    share(&frontend, &memory);
    let mut queues = queues(&memory, 1, 64, acked);
    let vring = queues[0].ring.vring.clone();
    frontend.set_vring_num(0, 64).expect("size");
    frontend.set_vring_base(0, 0).expect("base");
    frontend
        .set_vring_addr(0, &addresses(&vring))
        .expect("addresses");
    frontend.set_vring_call(0, &vring.call).expect("call");
    frontend.set_vring_kick(0, &vring.kick).expect("kick");
    disk.assert_reads(&memory, &mut queues[0], &buffers);
    let base = frontend.get_vring_base(0).expect("base");
    assert_eq!(base, u32::from(queues[0].ring.published()));
}

/// The guests above are tame; this one is the general guest of the other tests, so that a failure
/// here and none there points at an order of messages.
#[test]
fn the_general_guest_reads_too() {
    let disk = Disk::serve();
    disk.guest(Options::default())
        .assert_reads(0, &disk.content);
}
