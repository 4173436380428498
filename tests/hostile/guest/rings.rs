//! The rings themselves: heads, indexes, addresses, and floods.

use super::*;

#[test]
fn next_outside_of_the_ring() {
    for next in [128, 129, u16::MAX] {
        let mut target = target();
        let placed = target.guest.place(IN, 0, 512);
        let mut table = linked(&placed, 0);
        table[1].next = next;
        target.assert_table(Stopped, &table, &placed);
    }
}

#[test]
fn a_head_outside_of_the_ring() {
    for head in [128, 129, u16::MAX] {
        let mut target = target();
        target.guest.queues[0].ring.offer(head);
        target.guest.queues[0].ring.publish();
        let ring = &target.guest.queues[0].ring;
        assert!(signalled(&[&ring.vring.err]), "the queue stops");
        assert_eq!(ring.vring.used_index(), 0, "nothing is answered");
        target.assert_well(&Stopped);
    }
}

#[test]
fn a_driver_that_breaks_its_queue_over_and_over_does_not_flood_the_log() {
    const MANY: usize = 2000;
    let mut target = target();
    for _ in 0..MANY {
        let ring = &mut target.guest.queues[0].ring;
        ring.publish_index(ring.published().wrapping_add(300));
        assert!(signalled(&[&ring.vring.err]));
        target.guest.reset_queue(0).expect("reset");
    }
    let lines = target.disk.daemon.log().lines().count();
    assert!((1..MANY / 2).contains(&lines), "{lines} lines");
    target.assert_well(&Served);
}

#[test]
fn an_available_index_that_jumps() {
    for jump in [129, 300, 0x8000, u16::MAX] {
        let mut target = target();
        target.guest.assert_reads(0, &target.disk.content.clone());
        let ring = &mut target.guest.queues[0].ring;
        let index = ring.published().wrapping_add(jump);
        ring.publish_index(index);
        assert!(
            signalled(&[&ring.vring.err]),
            "the error eventfd tells of a jump by {jump}"
        );
        assert_eq!(ring.vring.used_index(), ring.taken(), "nothing is answered");
        target.assert_well(&Stopped);
    }
}

#[test]
fn the_same_head_twice() {
    let mut target = target();
    let placed = target.guest.place(IN, 0, 512);
    let head = target.guest.queues[0].submit(&placed.chain, Layout::Direct);
    let ring = &mut target.guest.queues[0].ring;
    for _ in 0..20 {
        ring.offer(head);
    }
    ring.publish();
    // Without an in-flight region the device cannot know: it answers as often as it was asked.
    for _ in 0..21 {
        let used = loop {
            let ring = &mut target.guest.queues[0].ring;
            assert!(ring.vring.err.read().is_err(), "the queue stopped");
            match ring.take() {
                Some(used) => break used,
                None => std::thread::yield_now(),
            }
        };
        assert_eq!(used.head, u32::from(head));
    }
    target.guest.reset_queue(0).expect("reset");
    target.assert_well(&Served);
}

#[test]
fn rings_outside_of_memory() {
    type Break = fn(&mut common::ring::Addresses, u64);
    let breaks: [Break; 3] = [
        |at, to| at.descriptors = to,
        |at, to| at.available = to,
        |at, to| at.used = to,
    ];
    for ring_part in breaks {
        // Nowhere, at the top of the address space, and a ring that runs over a region's end.
        for place in 0..3 {
            let mut target = target();
            target.guest.session.stop_queue(0).expect("stop");
            let region = &target.guest.memory.regions[3];
            let to = match place {
                0 => 0x1000,
                1 => u64::MAX - 0xf,
                _ => region.user_address(region.end() - 16),
            };
            let mut vring = target.guest.queues[0].ring.vring.clone();
            ring_part(&mut vring.at, to);
            let base = target.guest.queues[0].ring.taken();
            // Memory may come after the addresses: that they lie in none shows when the queue starts.
            let started = target.guest.session.start_queue(0, &vring, base);
            started.expect("messages that are taken");
            vring.kick.write(1).expect("kick");
            assert!(signalled(&[&vring.err]), "the queue is given up");
            target.assert_well(&Stopped);
        }
    }
}

#[test]
fn a_flood_of_bad_chains_neither_fills_the_log_nor_stops_the_queue() {
    let mut target = target();
    let mut placed = target.guest.place(IN, 0, 512);
    placed.chain[1].address = Memory::HOLE;
    for _ in 0..100 {
        for _ in 0..30 {
            target.guest.queues[0].submit(&placed.chain, Layout::Direct);
        }
        target.guest.queues[0].publish();
        for _ in 0..30 {
            target.guest.queues[0].wait();
            assert_eq!(target.guest.memory.read(placed.status, 1), [IOERR]);
        }
    }
    target.assert_well(&Refused);
    let log = target.disk.daemon.log().len();
    assert!(
        log < 64 << 10,
        "3000 bad chains wrote {log} bytes to the log"
    );
}
