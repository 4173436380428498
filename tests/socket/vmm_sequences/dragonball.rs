//! Dragonball: everything is acknowledged, and a new connection sends no base.

use super::*;

/// Dragonball's `negotiate`: the message order of its activation. The base is only sent at the
/// first start.
fn activate(frontend: &mut Frontend, memory: &Memory, queues: &[Queue], base: bool) {
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
fn look(disk: &Disk) -> Frontend {
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
fn acknowledges_everything_and_reconnects_without_a_base() {
    let mut disk = Disk::serve();
    let memory = Memory::typical();
    let buffers = Buffers::new(&memory);
    let mut frontend = look(&disk);
    let mut queues = queues(&memory, 2, 128, feature::EVENT_IDX);
    activate(&mut frontend, &memory, &queues, true);
    for round in 0..4 {
        for queue in &mut queues {
            disk.assert_reads(&memory, queue, &buffers);
        }
        disk.daemon.kill();
        // Submitted while no daemon serves: behind the used index, which is the base then.
        let placed = buffers.place(&memory, 7, 1234 + round);
        queues[1].submit(&placed.chain, Layout::Direct);
        queues[1].publish();
        disk.daemon.restart();
        frontend = disk.connect();
        activate(&mut frontend, &memory, &queues, false);
        queues[1].wait();
        disk.assert_data(&memory, &placed, 1234 + round);
        for queue in &mut queues {
            disk.assert_reads(&memory, queue, &buffers);
        }
    }
}
