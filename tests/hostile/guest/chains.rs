//! Chains in the ring's own table: framing, direction, loops, memory that is not there.

use vhost::vhost_user::VhostUserFrontend;

use super::*;

#[test]
fn no_status() {
    let mut target = target();
    let mut placed = target.guest.place(IN, 0, 512);
    placed.chain.truncate(1);
    target.assert(Stopped, placed, Layout::Direct);
}

#[test]
fn status_in_a_descriptor_the_device_may_not_write() {
    for data in [0, 512] {
        let mut target = target();
        let mut placed = target.guest.place(IN, 0, data);
        placed.chain.last_mut().expect("status").write = false;
        target.assert(Stopped, placed, Layout::Direct);
    }
}

#[test]
fn data_in_a_descriptor_the_device_may_not_write() {
    let mut target = target();
    let mut placed = target.guest.place(IN, 0, 512);
    placed.chain[1].write = false;
    target.assert(Refused, placed, Layout::Direct);
}

#[test]
fn readable_descriptor_after_a_writable_one() {
    let mut target = target();
    let mut placed = target.guest.place(IN, 0, 512);
    placed.chain.swap(0, 1);
    target.assert(Refused, placed, Layout::Direct);
}

#[test]
fn header_too_short() {
    for len in [1, 15] {
        let mut target = target();
        let mut placed = target.guest.place(IN, 0, 512);
        placed.chain[0].len = len;
        target.assert(Refused, placed, Layout::Direct);
    }
}

#[test]
fn no_header_at_all() {
    let mut target = target();
    let mut placed = target.guest.place(IN, 0, 512);
    placed.chain.remove(0);
    target.assert(Refused, placed, Layout::Indirect);
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
        let verdict = target.verdict(&placed.chain, placed.status);
        assert_eq!(verdict, Served);
        let data = target.guest.memory.read(placed.data[0].address, 512);
        assert_eq!(difference(&data, target.disk.expected(5, 512)), None);
        target.assert_well(&verdict);
    }
}

#[test]
fn a_descriptor_that_names_itself() {
    let mut target = target();
    let placed = target.guest.place(IN, 0, 512);
    let mut table = linked(&placed, 0);
    table[0].next = 0;
    target.assert_table(Stopped, &table, &placed);
}

#[test]
fn a_loop_over_the_writable_descriptors() {
    let mut target = target();
    let placed = target.guest.place(IN, 0, 512);
    let mut table = linked(&placed, 0);
    table[2].flags |= NEXT;
    table[2].next = 1;
    target.assert_table(Stopped, &table, &placed);
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
        target.assert(Refused, placed, Layout::Direct);
    }
}

#[test]
fn header_outside_of_memory() {
    for address in [Memory::HOLE, u64::MAX - 7, 0x1_0100_0000 - 8] {
        let mut target = target();
        let mut placed = target.guest.place(IN, 0, 512);
        placed.chain[0].address = address;
        target.assert(Refused, placed, Layout::Direct);
    }
}

#[test]
fn status_outside_of_memory() {
    let mut target = target();
    let mut placed = target.guest.place(IN, 0, 512);
    placed.chain[2].address = Memory::HOLE;
    target.assert(Stopped, placed, Layout::Direct);
}

#[test]
fn data_of_which_the_last_byte_is_outside_of_memory() {
    let mut target = target();
    let mut placed = target.guest.place(IN, 0, 1024);
    // Of two pieces the second, so that the first is in the chain by then.
    placed.chain[1].len = 512;
    placed
        .chain
        .insert(2, Segment::writable(0x1_0100_0000 - 511, 512));
    target.assert(Refused, placed, Layout::Direct);
}

#[test]
fn status_at_the_end_of_data_that_begin_outside_of_memory() {
    let mut target = target();
    let base = target.guest.memory.regions[3].base();
    let mut placed = target.guest.place(IN, 0, 512);
    placed.chain.truncate(1);
    placed.chain.push(Segment::writable(base - 512, 513));
    target.guest.memory.write(base, &[UNANSWERED]);
    placed.status = base;
    target.assert(Refused, placed, Layout::Direct);
}

#[test]
fn data_in_a_region_that_was_removed() {
    let mut target = target();
    let region = &target.guest.memory.regions[2];
    let data = region.alloc(512, 512);
    let removed = target
        .guest
        .session
        .frontend
        .remove_mem_region(&region.info());
    removed.expect("region removed");
    let mut placed = target.guest.place(IN, 0, 512);
    placed.chain[1].address = data;
    target.assert(Refused, placed, Layout::Direct);
}
