//! Cloud Hypervisor: every base is the available index; a new connection sends the old
//! acknowledgements without asking what is offered.

use super::*;

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
        let acked = offered & GUEST_FEATURES & !feature::LOG_ALL;
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

#[test]
fn activates_resets_and_activates_again() {
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
fn pauses_and_resumes() {
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
fn reconnects_to_a_restarted_daemon() {
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
/// flight, so that what the guest submitted while no daemon served is answered although the base
/// the VMM sends lies behind it.
#[test]
fn requests_submitted_while_disconnected_are_answered() {
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
