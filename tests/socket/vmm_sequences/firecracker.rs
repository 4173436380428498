//! Firecracker: few features, one queue, no replies.

use super::*;

#[test]
fn its_few_features_and_one_queue_of_256() {
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
