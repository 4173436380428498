//! The messages each VMM sends, in its order, and then reads that must be right.
//!
//! The orders are those of Cloud Hypervisor 53, QEMU 7.2 and 10.0, Firecracker 1.13 and Dragonball
//! (in Kata Containers 3), read from their sources.

mod common;

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

/// What Cloud Hypervisor asks for, of what is offered.
const CH_FEATURES: u64 = feature::SIZE_MAX
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

struct CloudHypervisor {
    frontend: Frontend,
    acked: u64,
    protocol: Protocol,
    inflight: Option<(VhostUserInflight, std::fs::File)>,
}

impl CloudHypervisor {
    fn start(disk: &Disk, inflight: bool) -> Self {
        let mut frontend = disk.connect();
        frontend.set_owner().expect("owner");
        let offered = frontend.get_features().expect("features");
        let mut wanted = Protocol::CONFIG
            | Protocol::MQ
            | Protocol::CONFIGURE_MEM_SLOTS
            | Protocol::REPLY_ACK
            | Protocol::LOG_SHMFD
            | Protocol::DEVICE_STATE;
        wanted.set(Protocol::INFLIGHT_SHMFD, inflight);
        let protocol = frontend.get_protocol_features().expect("protocol features") & wanted;
        assert!(protocol.contains(Protocol::CONFIG | Protocol::MQ | Protocol::REPLY_ACK));
        assert_eq!(protocol.contains(Protocol::INFLIGHT_SHMFD), inflight);
        frontend
            .set_protocol_features(protocol)
            .expect("protocol features");
        ask_for_replies(&frontend);
        assert!(frontend.get_queue_num().expect("queues") >= 2);
        disk.assert_config(&mut frontend, 0);
        // The guest never acknowledges LOG_ALL.
        let acked = offered & CH_FEATURES & !feature::LOG_ALL;
        Self {
            frontend,
            acked,
            protocol,
            inflight: None,
        }
    }

    /// Memory, queues, in-flight region, in its order; every base is the available index.
    fn activate(&mut self, memory: &Memory, queues: &[Queue]) {
        let frontend = &mut self.frontend;
        frontend.set_features(self.acked).expect("features");
        share(frontend, memory);
        for (index, queue) in queues.iter().enumerate() {
            frontend
                .set_vring_num(index, queue.ring.size())
                .expect("size");
        }
        if self.protocol.contains(Protocol::INFLIGHT_SHMFD) {
            let size = queues[0].ring.size();
            let kept = self.inflight.take();
            let (info, file) = kept.unwrap_or_else(|| {
                let wanted = VhostUserInflight::new(0, 0, queues.len() as u16, size);
                frontend.get_inflight_fd(&wanted).expect("in-flight region")
            });
            frontend
                .set_inflight_fd(&info, file.as_raw_fd())
                .expect("in-flight region");
            self.inflight = Some((info, file));
        }
        for (index, queue) in queues.iter().enumerate() {
            let vring = &queue.ring.vring;
            frontend
                .set_vring_addr(index, &addresses(vring))
                .expect("addresses");
            frontend
                .set_vring_base(index, queue.ring.published())
                .expect("base");
            frontend.set_vring_call(index, &vring.call).expect("call");
            frontend.set_vring_kick(index, &vring.kick).expect("kick");
        }
        for index in 0..queues.len() {
            frontend.set_vring_enable(index, true).expect("enable");
        }
    }

    fn reset(&mut self, queues: usize) {
        for index in 0..queues {
            self.frontend
                .set_vring_enable(index, false)
                .expect("disable");
            self.frontend.get_vring_base(index).expect("base");
        }
        self.inflight = None;
    }

    /// A new connection: the old acknowledgements, no GET_PROTOCOL_FEATURES, no GET_CONFIG.
    fn reconnect(&mut self, disk: &Disk, memory: &Memory, queues: &[Queue]) {
        let mut frontend = disk.connect();
        frontend.set_owner().expect("owner");
        frontend.get_features().expect("features");
        frontend
            .set_protocol_features(self.protocol)
            .expect("protocol features");
        ask_for_replies(&frontend);
        self.frontend = frontend;
        self.activate(memory, queues);
    }
}

fn queues(memory: &Memory, count: usize, size: u16, acked: u64) -> Vec<Queue> {
    let event_idx = acked & feature::EVENT_IDX != 0;
    (0..count)
        .map(|_| Queue::new(memory, size, event_idx))
        .collect()
}

#[test]
fn cloud_hypervisor_activates_resets_and_activates_again() {
    let disk = Disk::serve();
    let memory = Memory::typical();
    let buffers = Buffers::new(&memory);
    for inflight in [false, true] {
        let mut vmm = CloudHypervisor::start(&disk, inflight);
        let mut queues = queues(&memory, 2, 128, vmm.acked);
        for _ in 0..3 {
            vmm.activate(&memory, &queues);
            for queue in &mut queues {
                disk.assert_reads(&memory, queue, &buffers);
            }
            vmm.reset(queues.len());
            queues.iter_mut().for_each(Queue::reset);
        }
    }
}

#[test]
fn cloud_hypervisor_pauses_and_resumes() {
    let disk = Disk::serve();
    let memory = Memory::typical();
    let buffers = Buffers::new(&memory);
    let mut vmm = CloudHypervisor::start(&disk, true);
    let mut queues = queues(&memory, 1, 128, vmm.acked);
    vmm.activate(&memory, &queues);
    for round in 0..50 {
        disk.assert_reads(&memory, &mut queues[0], &buffers);
        vmm.frontend.set_vring_enable(0, false).expect("pause");
        let placed = buffers.place(&memory, 1, round);
        queues[0].submit(&placed.chain, Layout::Direct);
        queues[0].publish();
        vmm.frontend.set_vring_enable(0, true).expect("resume");
        queues[0].wait();
        disk.assert_data(&memory, &placed, round);
    }
}

#[test]
fn cloud_hypervisor_reconnects_to_a_restarted_daemon() {
    let mut disk = Disk::serve();
    let memory = Memory::typical();
    let buffers = Buffers::new(&memory);
    for inflight in [false, true] {
        let mut vmm = CloudHypervisor::start(&disk, inflight);
        let mut queues = queues(&memory, 2, 128, vmm.acked);
        vmm.activate(&memory, &queues);
        for _ in 0..4 {
            for queue in &mut queues {
                disk.assert_reads(&memory, queue, &buffers);
            }
            disk.daemon.kill();
            disk.daemon.restart();
            vmm.reconnect(&disk, &memory, &queues);
        }
        for queue in &mut queues {
            disk.assert_reads(&memory, queue, &buffers);
        }
    }
}

/// With an in-flight region the available ring is taken up at the used index plus what is in
/// flight, so that what the guest submitted while nobody served is answered although the base
/// the VMM sends lies behind it.
#[test]
fn cloud_hypervisor_requests_submitted_while_disconnected_are_answered() {
    let mut disk = Disk::serve();
    let memory = Memory::typical();
    let buffers = Buffers::new(&memory);
    let mut vmm = CloudHypervisor::start(&disk, true);
    let mut queues = queues(&memory, 1, 128, vmm.acked);
    vmm.activate(&memory, &queues);
    disk.assert_reads(&memory, &mut queues[0], &buffers);
    disk.daemon.kill();
    let mut placed: Vec<_> = (0..8)
        .map(|slot| buffers.place(&memory, slot, 99 + slot))
        .collect();
    for request in &placed {
        queues[0].submit(&request.chain, Layout::Direct);
    }
    queues[0].publish();
    disk.daemon.restart();
    vmm.reconnect(&disk, &memory, &queues);
    for _ in 0..placed.len() {
        queues[0].wait();
    }
    assert_eq!(queues[0].in_flight(), 0);
    for (sector, request) in (99..).zip(placed.drain(..)) {
        disk.assert_data(&memory, &request, sector);
    }
    disk.assert_reads(&memory, &mut queues[0], &buffers);
}

/// What QEMU passes through to its guest.
const QEMU_FEATURES: u64 = CH_FEATURES;

struct Qemu {
    frontend: Frontend,
    acked: u64,
    protocol: Protocol,
}

impl Qemu {
    /// vhost_user_backend_init, vhost_dev_init and the realize of vhost-user-blk.
    fn connect(disk: &Disk, queues: &[Queue]) -> Self {
        let mut frontend = disk.connect();
        let offered = frontend.get_features().expect("features");
        let known = Protocol::MQ
            | Protocol::LOG_SHMFD
            | Protocol::REPLY_ACK
            | Protocol::CONFIG
            | Protocol::INFLIGHT_SHMFD
            | Protocol::RESET_DEVICE
            | Protocol::CONFIGURE_MEM_SLOTS;
        let protocol = frontend.get_protocol_features().expect("protocol features") & known;
        frontend
            .set_protocol_features(protocol)
            .expect("protocol features");
        assert!(frontend.get_queue_num().expect("queues") >= queues.len() as u64);
        if protocol.contains(Protocol::CONFIGURE_MEM_SLOTS) {
            assert!(frontend.get_max_mem_slots().expect("memory slots") >= 4);
        }
        frontend.set_owner().expect("owner");
        frontend.get_features().expect("features");
        for (index, queue) in queues.iter().enumerate() {
            frontend
                .set_vring_call(index, &queue.ring.vring.call)
                .expect("call");
        }
        disk.assert_config(&mut frontend, 0);
        let acked = offered & QEMU_FEATURES & !feature::LOG_ALL;
        Self {
            frontend,
            acked,
            protocol,
        }
    }

    /// vhost_user_blk_start: the in-flight region before the memory. Only some messages ask for a
    /// reply, as in QEMU those do that set memory.
    fn start(&mut self, memory: &Memory, queues: &[Queue], bases: &[u16]) {
        let frontend = &mut self.frontend;
        frontend.set_features(self.acked).expect("features");
        if self.protocol.contains(Protocol::INFLIGHT_SHMFD) {
            let wanted = VhostUserInflight::new(0, 0, queues.len() as u16, queues[0].ring.size());
            let (info, file) = frontend.get_inflight_fd(&wanted).expect("in-flight region");
            frontend
                .set_inflight_fd(&info, file.as_raw_fd())
                .expect("in-flight region");
        }
        frontend.set_features(self.acked).expect("features");
        if self.protocol.contains(Protocol::CONFIGURE_MEM_SLOTS) {
            for region in &memory.regions {
                frontend.add_mem_region(&region.info()).expect("memory");
            }
        } else {
            share(frontend, memory);
        }
        for (index, (queue, base)) in queues.iter().zip(bases).enumerate() {
            let vring = &queue.ring.vring;
            frontend.set_vring_num(index, vring.size).expect("size");
            frontend.set_vring_base(index, *base).expect("base");
            frontend
                .set_vring_addr(index, &addresses(vring))
                .expect("addresses");
            frontend.set_vring_kick(index, &vring.kick).expect("kick");
            frontend.set_vring_call(index, &vring.call).expect("call");
        }
        for (index, queue) in queues.iter().enumerate() {
            frontend.set_vring_enable(index, true).expect("enable");
            queue.ring.vring.kick.write(1).expect("kick");
        }
    }

    /// vhost_dev_stop.
    fn stop(&mut self, memory: &Memory, queues: usize) -> Vec<u16> {
        let base = |index| self.frontend.get_vring_base(index).expect("base") as u16;
        let bases = (0..queues).map(base).collect();
        if self.protocol.contains(Protocol::CONFIGURE_MEM_SLOTS) {
            for region in &memory.regions {
                self.frontend
                    .remove_mem_region(&region.info())
                    .expect("memory");
            }
        }
        bases
    }
}

#[test]
fn qemu_starts_stops_and_starts_where_it_stood() {
    let disk = Disk::serve();
    let memory = Memory::typical();
    let buffers = Buffers::new(&memory);
    let mut queues = queues(&memory, 2, 128, QEMU_FEATURES);
    let mut vmm = Qemu::connect(&disk, &queues);
    let mut bases = vec![0; 2];
    for _ in 0..3 {
        vmm.start(&memory, &queues, &bases);
        for queue in &mut queues {
            disk.assert_reads(&memory, queue, &buffers);
        }
        bases = vmm.stop(&memory, 2);
        let stand: Vec<_> = queues.iter().map(|queue| queue.ring.published()).collect();
        assert_eq!(bases, stand);
    }
}

/// QEMU takes the used index for its base when GET_VRING_BASE failed: what it submitted and what
/// nobody answered is served again.
#[test]
fn qemu_reconnects_with_the_used_index_as_base() {
    let mut disk = Disk::serve();
    let memory = Memory::typical();
    let buffers = Buffers::new(&memory);
    let mut queues = queues(&memory, 1, 128, QEMU_FEATURES);
    let mut vmm = Qemu::connect(&disk, &queues);
    vmm.start(&memory, &queues, &[0]);
    for round in 0..4 {
        disk.assert_reads(&memory, &mut queues[0], &buffers);
        disk.daemon.kill();
        let placed: Vec<_> = (0..5)
            .map(|slot| buffers.place(&memory, slot, round + slot))
            .collect();
        for request in &placed {
            queues[0].submit(&request.chain, Layout::Indirect);
        }
        queues[0].publish();
        disk.daemon.restart();
        vmm = Qemu::connect(&disk, &queues);
        let base = queues[0].ring.vring.used_index();
        vmm.start(&memory, &queues, &[base]);
        for _ in 0..placed.len() {
            queues[0].wait();
        }
        for (sector, request) in (round..).zip(&placed) {
            disk.assert_data(&memory, request, sector);
        }
    }
}

#[test]
fn firecracker_with_its_few_features_and_one_queue_of_256() {
    let disk = Disk::serve();
    let memory = Memory::typical();
    let buffers = Buffers::new(&memory);
    for event_idx in [feature::EVENT_IDX, 0] {
        let mut frontend = disk.connect();
        frontend.set_owner().expect("owner");
        let offered = frontend.get_features().expect("features");
        let wanted =
            feature::VERSION_1 | event_idx | feature::PROTOCOL | feature::RO | feature::FLUSH;
        frontend.get_protocol_features().expect("protocol features");
        frontend
            .set_protocol_features(Protocol::CONFIG)
            .expect("protocol features");
        disk.assert_config(&mut frontend, 0);

        let acked = offered & wanted;
        let mut queues = queues(&memory, 1, 256, acked);
        let vring = queues[0].ring.vring.clone();
        frontend.set_features(acked).expect("features");
        share(&frontend, &memory);
        frontend.set_vring_num(0, 256).expect("size");
        frontend
            .set_vring_addr(0, &addresses(&vring))
            .expect("addresses");
        frontend
            .set_vring_base(0, queues[0].ring.published())
            .expect("base");
        frontend.set_vring_call(0, &vring.call).expect("call");
        frontend.set_vring_kick(0, &vring.kick).expect("kick");
        frontend.set_vring_enable(0, true).expect("enable");
        disk.assert_reads(&memory, &mut queues[0], &buffers);

        // PATCH /drives reads the config space again while the queue runs.
        disk.assert_config(&mut frontend, 0);
        disk.assert_reads(&memory, &mut queues[0], &buffers);
    }
}

/// Dragonball's `negotiate`: the message order of its activation. The base is only sent at the
/// first start.
fn dragonball_activate(frontend: &mut Frontend, memory: &Memory, queues: &[Queue], base: bool) {
    frontend.set_owner().expect("owner");
    let offered = frontend.get_features().expect("features");
    frontend
        .set_features(offered)
        .expect("all features offered");
    let protocol = frontend.get_protocol_features().expect("protocol features");
    let wanted =
        Protocol::MQ | Protocol::CONFIG | Protocol::CONFIGURE_MEM_SLOTS | Protocol::REPLY_ACK;
    assert!(
        protocol.contains(Protocol::MQ | Protocol::CONFIG),
        "it insists on both"
    );
    frontend
        .set_protocol_features(protocol & wanted)
        .expect("protocol features");
    assert!(frontend.get_queue_num().expect("queues") >= queues.len() as u64);
    for (index, queue) in queues.iter().enumerate() {
        frontend
            .set_vring_call(index, &queue.ring.vring.call)
            .expect("call before memory");
    }
    share(frontend, memory);
    for (index, queue) in queues.iter().enumerate() {
        let vring = &queue.ring.vring;
        frontend.set_vring_num(index, vring.size).expect("size");
        if base {
            frontend.set_vring_base(index, 0).expect("base");
        }
        frontend
            .set_vring_addr(index, &addresses(vring))
            .expect("addresses");
        frontend.set_vring_kick(index, &vring.kick).expect("kick");
        frontend.set_vring_call(index, &vring.call).expect("call");
    }
    for index in 0..queues.len() {
        frontend.set_vring_enable(index, true).expect("enable");
    }
}

/// The device's first look: everything acknowledged, no owner, config at offset 0x100.
fn dragonball_look(disk: &Disk) -> Frontend {
    let mut frontend = disk.connect();
    let offered = frontend.get_features().expect("features");
    frontend
        .set_features(offered)
        .expect("all features offered");
    let protocol = frontend.get_protocol_features().expect("protocol features");
    frontend
        .set_protocol_features(protocol)
        .expect("all protocol features offered");
    disk.assert_config(&mut frontend, 0x100);
    frontend
}

#[test]
fn dragonball_acknowledges_everything_and_reconnects_without_a_base() {
    let mut disk = Disk::serve();
    let memory = Memory::typical();
    let buffers = Buffers::new(&memory);
    let mut frontend = dragonball_look(&disk);
    let mut queues = queues(&memory, 2, 128, feature::EVENT_IDX);
    dragonball_activate(&mut frontend, &memory, &queues, true);
    for round in 0..4 {
        for queue in &mut queues {
            disk.assert_reads(&memory, queue, &buffers);
        }
        disk.daemon.kill();
        // Submitted while nobody serves: behind the used index, which is the base then.
        let placed = buffers.place(&memory, 7, 1234 + round);
        queues[1].submit(&placed.chain, Layout::Direct);
        queues[1].publish();
        disk.daemon.restart();
        frontend = disk.connect();
        dragonball_activate(&mut frontend, &memory, &queues, false);
        queues[1].wait();
        disk.assert_data(&memory, &placed, 1234 + round);
        for queue in &mut queues {
            disk.assert_reads(&memory, queue, &buffers);
        }
    }
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
