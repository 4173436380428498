//! Chains in the ring's own table: framing, direction, loops, memory that is not there.

use super::*;

#[test]
fn no_status() {
    let mut target = target();
    let mut placed = target.guest.place(IN, 0, 512);
    placed.chain.truncate(1);
    target.assert_refused(&placed, Layout::Direct);
}

#[test]
fn status_in_a_descriptor_the_device_may_not_write() {
    for data in [0, 512] {
        let mut target = target();
        let mut placed = target.guest.place(IN, 0, data);
        placed.chain.last_mut().expect("status").write = false;
        target.assert_refused(&placed, Layout::Direct);
    }
}

#[test]
fn data_in_a_descriptor_the_device_may_not_write() {
    // Readable data and one writable byte: a read of no bytes.
    let mut target = target();
    let mut placed = target.guest.place(IN, 0, 512);
    placed.chain[1].write = false;
    target.guest.queues[0].submit(&placed.chain, Layout::Direct);
    assert_eq!(target.answer(&placed), Answer::Served(1));
    target.assert_well();
}

#[test]
fn readable_descriptor_after_a_writable_one() {
    let mut target = target();
    let mut placed = target.guest.place(IN, 0, 512);
    placed.chain.swap(0, 1);
    target.assert_refused(&placed, Layout::Direct);
}

#[test]
fn header_too_short() {
    for len in [1, 15] {
        let mut target = target();
        let mut placed = target.guest.place(IN, 0, 512);
        placed.chain[0].len = len;
        target.assert_refused(&placed, Layout::Direct);
    }
}

#[test]
fn no_header_at_all() {
    let mut target = target();
    let mut placed = target.guest.place(IN, 0, 512);
    placed.chain.remove(0);
    target.assert_refused(&placed, Layout::Indirect);
}

#[test]
fn zero_length_descriptors_are_skipped() {
    for (at, write) in [(0, false), (1, false), (1, true), (2, true), (3, true)] {
        let mut target = target();
        let mut placed = target.guest.place(IN, 5, 512);
        let address = placed.chain[0].address;
        placed.chain.insert(
            at,
            Segment {
                address,
                len: 0,
                write,
            },
        );
        target.guest.queues[0].submit(&placed.chain, Layout::Direct);
        target.assert_offered_served(&placed);
    }
}

#[test]
fn a_descriptor_that_names_itself() {
    let mut target = target();
    let placed = target.guest.place(IN, 0, 512);
    let mut table = linked(&placed, 0);
    table[0].next = 0;
    target.assert_refused_table(&table, &placed);
}

#[test]
fn a_loop_over_the_writable_descriptors() {
    let mut target = target();
    let placed = target.guest.place(IN, 0, 512);
    let mut table = linked(&placed, 0);
    table[2].flags |= NEXT;
    table[2].next = 1;
    target.assert_refused_table(&table, &placed);
}

#[test]
fn data_outside_of_memory() {
    for (address, len) in [
        (Memory::HOLE, 512),
        (0, 512),
        (u64::MAX - 511, 512),
        (u64::MAX - 100, 512),
        // The last region ends in the middle of these.
        (0x1_0100_0000 - 511, 512),
        (0x1_0100_0000 - 512, 1 << 20),
        (0x1_0000_0000, 0xffff_fe00),
    ] {
        let mut target = target();
        let mut placed = target.guest.place(IN, 0, 512);
        placed.chain[1].address = address;
        placed.chain[1].len = len;
        target.assert_refused(&placed, Layout::Direct);
    }
}

#[test]
fn header_outside_of_memory() {
    for address in [Memory::HOLE, u64::MAX - 7, 0x1_0100_0000 - 8] {
        let mut target = target();
        let mut placed = target.guest.place(IN, 0, 512);
        placed.chain[0].address = address;
        target.assert_refused(&placed, Layout::Direct);
    }
}

#[test]
fn status_outside_of_memory() {
    let mut target = target();
    let mut placed = target.guest.place(IN, 0, 512);
    placed.chain[2].address = Memory::HOLE;
    target.assert_refused(&placed, Layout::Direct);
}
