//! In-flight areas that were made for fewer or shorter queues than the driver then uses: with
//! virtio-mmio it may take longer ones than QEMU asked for, and Cloud Hypervisor counts those that
//! are ready, whatever their numbers.

use std::fs::File;

use super::*;

struct Area {
    info: VhostUserInflight,
    file: File,
}

impl Area {
    fn made(frontend: &mut Frontend, queues: u16, size: u16) -> Self {
        let wanted = VhostUserInflight::new(0, 0, queues, size);
        let (info, file) = frontend.get_inflight_fd(&wanted).expect("in-flight area");
        assert_eq!((info.num_queues, info.queue_size), (queues, size));
        Self { info, file }
    }
}

/// A connection whose queue `index` runs with `area`.
fn start(
    disk: &Disk,
    area: Option<&Area>,
    memory: &Memory,
    index: usize,
    queue: &Queue,
) -> Frontend {
    let mut frontend = disk.connect();
    frontend.set_owner().expect("owner");
    let offered = frontend.get_features().expect("features");
    let protocol = frontend.get_protocol_features().expect("protocol features");
    frontend
        .set_protocol_features(protocol)
        .expect("protocol features");
    ask_for_replies(&frontend);
    let acked = offered & GUEST_FEATURES & !feature::LOG_ALL;
    frontend.set_features(acked).expect("features");
    if let Some(area) = area {
        frontend
            .set_inflight_fd(&area.info, area.file.as_raw_fd())
            .expect("in-flight area");
    }
    share(&frontend, memory);
    let vring = &queue.ring.vring;
    frontend.set_vring_num(index, vring.size).expect("size");
    frontend
        .set_vring_addr(index, &addresses(vring))
        .expect("addresses");
    // As Cloud Hypervisor: the available index, whatever was answered.
    let base = queue.ring.published();
    frontend.set_vring_base(index, base).expect("base");
    frontend.set_vring_call(index, &vring.call).expect("call");
    frontend.set_vring_kick(index, &vring.kick).expect("kick");
    frontend.set_vring_enable(index, true).expect("enable");
    frontend
}

/// Requests that were submitted while no daemon ran are answered: the area has a place for the queue.
fn assert_tracked(asked: (u16, u16), index: usize, size: u16) {
    let mut disk = Disk::serve();
    let memory = Memory::typical();
    let buffers = Buffers::new(&memory);
    let mut queue = Queue::new(&memory, size, true);
    let mut probe = start(&disk, None, &memory, index, &queue);
    let area = Area::made(&mut probe, asked.0, asked.1);
    let mut frontend = start(&disk, Some(&area), &memory, index, &queue);
    for round in 0..4 {
        assert!(frontend.get_features().is_ok(), "it is connected");
        disk.assert_reads(&memory, &mut queue, &buffers);
        disk.daemon.kill();
        let placed: Vec<_> = (0..8)
            .map(|slot| buffers.place(&memory, slot, 7 * round + slot))
            .collect();
        for request in &placed {
            queue.submit(&request.chain, Layout::Direct);
        }
        queue.publish();
        disk.daemon.restart();
        frontend = start(&disk, Some(&area), &memory, index, &queue);
        for (sector, request) in (7 * round..).zip(&placed) {
            queue.wait();
            disk.assert_data(&memory, request, sector);
        }
        disk.assert_reads(&memory, &mut queue, &buffers);
    }
    assert!(
        !disk
            .daemon
            .log()
            .contains("does not fit the in-flight area")
    );
}

#[test]
fn a_driver_takes_longer_queues_than_were_asked_for() {
    assert_tracked((1, 128), 0, 1024);
    assert_tracked((2, 128), 1, 256);
}

#[test]
fn a_queue_beyond_those_that_were_ready() {
    assert_tracked((1, 128), 1, 128);
    assert_tracked((1, 128), 200, 1024);
}

/// As an earlier version made it, or another program.
#[test]
fn an_area_without_a_place_for_the_queue_is_no_reason_not_to_serve_it() {
    let disk = Disk::serve();
    let memory = Memory::typical();
    let buffers = Buffers::new(&memory);
    let len = (16 + 16 * 128u64).next_multiple_of(64);
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let file = File::from(rustix::fs::memfd_create("area", flags).expect("memfd"));
    file.set_len(len).expect("length");
    let info = VhostUserInflight::new(len, 0, 1, 128);
    let area = Area { info, file };
    for (index, size) in [(0, 1024), (1, 128)] {
        let mut queue = Queue::new(&memory, size, true);
        let mut frontend = start(&disk, Some(&area), &memory, index, &queue);
        disk.assert_reads(&memory, &mut queue, &buffers);
        for _ in 0..3 {
            frontend.set_vring_enable(index, false).expect("disable");
            frontend.set_vring_enable(index, true).expect("enable");
            disk.assert_reads(&memory, &mut queue, &buffers);
        }
    }
    let log = disk.daemon.log();
    let lines = log.matches("does not fit the in-flight area").count();
    assert_eq!(lines, 2, "once for each connection: {log}");
}
