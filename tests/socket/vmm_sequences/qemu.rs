//! QEMU: the in-flight region before the memory; after a crash the base is the used index.

use common::raw::{NEED_REPLY, Raw};
use vhost::vhost_user::message::FrontendReq;

use super::*;

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
        let acked = offered & GUEST_FEATURES & !feature::LOG_ALL;
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
fn starts_stops_and_starts_where_it_stood() {
    let disk = Disk::serve();
    let memory = Memory::typical();
    let buffers = Buffers::new(&memory);
    let mut queues = queues(&memory, 2, 128, GUEST_FEATURES);
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

/// QEMU takes the used index for its base when GET_VRING_BASE failed: requests that were
/// submitted and not answered are served again.
#[test]
fn reconnects_with_the_used_index_as_base() {
    let mut disk = Disk::serve();
    let memory = Memory::typical();
    let buffers = Buffers::new(&memory);
    let mut queues = queues(&memory, 1, 128, GUEST_FEATURES);
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

/// The driver was not there yet (a paused start, or firmware) when the first connection broke. On
/// the second one QEMU 7.2 leaves out GET_ and SET_PROTOCOL_FEATURES, and believes the answers of
/// the first to be agreed upon still.
#[test]
fn reconnects_before_the_driver_without_protocol_features() {
    let mut disk = Disk::serve();
    let memory = Memory::typical();
    let buffers = Buffers::new(&memory);
    let mut queues = queues(&memory, 1, 128, GUEST_FEATURES);
    let vmm = Qemu::connect(&disk, &queues);
    disk.daemon.kill();
    disk.daemon.restart();
    let mut raw = Raw::new(disk.daemon.connect());
    let acked = vmm.acked.to_le_bytes();
    assert!(raw.send(FrontendReq::SET_FEATURES, 0, &acked, &[]));
    let wanted = [0u64, 0, 1 | 128 << 16].map(u64::to_le_bytes);
    let asked = raw.ask(FrontendReq::GET_INFLIGHT_FD, 0, wanted.as_flattened());
    let given = asked.expect("in-flight area");
    let area = given.file.as_ref().expect("in-flight area").as_raw_fd();
    let mut send = |request, body: &[u8], fds: &[i32]| {
        assert!(raw.send(request, NEED_REPLY, body, fds), "{request:?}");
        assert_eq!(raw.receive().expect("answer").number(), 0, "{request:?}");
    };
    send(FrontendReq::SET_INFLIGHT_FD, &given.body, &[area]);
    for region in &memory.regions {
        let info = region.info();
        let body = [
            0,
            info.guest_phys_addr,
            info.memory_size,
            info.userspace_addr,
            info.mmap_offset,
        ];
        let body = body.map(u64::to_le_bytes);
        send(
            FrontendReq::ADD_MEM_REG,
            body.as_flattened(),
            &[info.mmap_handle],
        );
    }
    let vring = queues[0].ring.vring.clone();
    let state = |value: u32| [0, value].map(u32::to_le_bytes).concat();
    let at = [vring.at.descriptors, vring.at.used, vring.at.available, 0];
    let at = [&[0; 8][..], at.map(u64::to_le_bytes).as_flattened()].concat();
    send(FrontendReq::SET_VRING_NUM, &state(128), &[]);
    send(FrontendReq::SET_VRING_BASE, &state(0), &[]);
    send(FrontendReq::SET_VRING_ADDR, &at, &[]);
    send(
        FrontendReq::SET_VRING_KICK,
        &[0; 8],
        &[vring.kick.as_raw_fd()],
    );
    send(
        FrontendReq::SET_VRING_CALL,
        &[0; 8],
        &[vring.call.as_raw_fd()],
    );
    send(FrontendReq::SET_VRING_ENABLE, &state(1), &[]);
    disk.assert_reads(&memory, &mut queues[0], &buffers);
}
