//! The rings themselves: heads, indexes, addresses, and floods.

use std::time::Instant;

use super::*;
use common::PATIENCE;

#[test]
fn next_outside_of_the_ring() {
    for next in [128, 129, u16::MAX] {
        let mut target = target();
        let placed = target.guest.place(IN, 0, 512);
        let mut table = linked(&placed, 0);
        table[1].next = next;
        target.assert_refused_table(&table, &placed);
    }
}

#[test]
fn a_head_outside_of_the_ring() {
    for head in [128, 129, u16::MAX] {
        let mut target = target();
        target.guest.queues[0].ring.offer(head);
        target.guest.queues[0].ring.publish();
        assert!(
            signalled(&[&target.guest.queues[0].ring.vring.err]),
            "no answer can be given: the queue stops"
        );
        assert_eq!(target.guest.queues[0].ring.vring.used_index(), 0);
        target.assert_well_after_reset();
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
    target.assert_well();
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
        target.assert_well_after_reset();
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
    let mut answers = 0;
    let start = Instant::now();
    while answers < 21 {
        assert!(ring.vring.err.read().is_err(), "the queue stopped");
        if let Some(used) = ring.take() {
            assert_eq!(used.head, u32::from(head));
            answers += 1;
        }
        assert!(start.elapsed() < PATIENCE, "{answers} answers");
        std::thread::yield_now();
    }
    target.guest.reset_queue(0).expect("reset");
    target.assert_well();
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
            // The message is taken, for memory may come later; the queue stops when it starts.
            let base = target.guest.queues[0].ring.taken();
            let started = target.guest.session.start_queue(0, &vring, base);
            started.expect("addresses are looked at when the queue starts");
            vring.kick.write(1).expect("kick");
            assert!(signalled(&[&vring.err]), "the queue stops");
            target.assert_well_after_reset();
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
        }
    }
    target.assert_well();
    let log = target.disk.daemon.log().len();
    assert!(
        log < 64 << 10,
        "3000 bad chains wrote {log} bytes to the log"
    );
}
