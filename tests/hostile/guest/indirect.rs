//! Indirect tables (virtio 1.2, 2.7.5.3).

use super::*;

#[test]
fn a_loop_in_an_indirect_table() {
    let mut target = target();
    let placed = target.guest.place(IN, 0, 512);
    let mut table = linked(&placed, 0);
    table[2].flags |= NEXT;
    table[2].next = 1;
    let head = Descriptor {
        address: 0,
        len: 48,
        flags: INDIRECT,
        next: 0,
    };
    target.assert_indirect(Stopped, &table, head, &placed);
}

#[test]
fn next_outside_of_the_indirect_table() {
    for next in [3, 4, u16::MAX] {
        let mut target = target();
        let placed = target.guest.place(IN, 0, 512);
        let mut table = linked(&placed, 0);
        // What lies behind the table is a good status descriptor, which is not part of this chain.
        let behind = table[2];
        table[1].next = next;
        table.push(behind);
        let head = Descriptor {
            address: 0,
            len: 48,
            flags: INDIRECT,
            next: 0,
        };
        target.assert_indirect(Stopped, &table, head, &placed);
    }
}

#[test]
fn an_indirect_table_that_is_no_multiple_of_sixteen_bytes() {
    for len in [0, 1, 15, 47, 49] {
        let mut target = target();
        let placed = target.guest.place(IN, 0, 512);
        let head = Descriptor {
            address: 0,
            len,
            flags: INDIRECT,
            next: 0,
        };
        target.assert_indirect(Stopped, &linked(&placed, 0), head, &placed);
    }
}

#[test]
fn an_indirect_table_in_an_indirect_table() {
    let mut target = target();
    let placed = target.guest.place(IN, 0, 512);
    let inner = target.guest.queues[0].reserve_table();
    for (index, entry) in (0..).zip(linked(&placed, 0)) {
        entry.write(&target.guest.memory, inner, index);
    }
    let nested = Descriptor {
        address: inner,
        len: 48,
        flags: INDIRECT,
        next: 0,
    };
    let head = Descriptor {
        address: 0,
        len: 16,
        flags: INDIRECT,
        next: 0,
    };
    target.assert_indirect(Stopped, &[nested], head, &placed);
}

#[test]
fn an_indirect_descriptor_that_goes_on() {
    let mut target = target();
    let placed = target.guest.place(IN, 0, 512);
    let head = Descriptor {
        address: 0,
        len: 48,
        flags: INDIRECT | NEXT,
        next: 1,
    };
    target.assert_indirect(Stopped, &linked(&placed, 0), head, &placed);
}

#[test]
fn an_indirect_table_outside_of_memory() {
    for (address, len) in [
        (Memory::HOLE, 48),
        (u64::MAX - 31, 48),
        (0x1_0100_0000 - 16, 48),
    ] {
        let mut target = target();
        let placed = target.guest.place(IN, 0, 512);
        let head = Descriptor {
            address,
            len,
            flags: INDIRECT,
            next: 0,
        };
        target.assert_table(Stopped, &[head], &placed);
    }
}

#[test]
fn a_huge_indirect_table() {
    // One region full of table: 16 MiB that claim to be 4 GiB, and 1 MiB that is there.
    for len in [0xffff_fff0, 1 << 20] {
        let mut target = target();
        let placed = target.guest.place(IN, 0, 512);
        let table = target.guest.memory.regions[3].alloc(1 << 20, 16);
        let byte = placed.data[0].address;
        for index in 0..1 << 16 {
            let next = (index + 1) as u16;
            let entry = match index {
                0 => Descriptor {
                    address: placed.chain[0].address,
                    len: HEADER,
                    flags: NEXT,
                    next,
                },
                _ => Descriptor {
                    address: byte,
                    len: 1,
                    flags: WRITE | NEXT,
                    next,
                },
            };
            entry.write(&target.guest.memory, table, index);
        }
        let head = Descriptor {
            address: table,
            len,
            flags: INDIRECT,
            next: 0,
        };
        target.assert_table(Stopped, &[head], &placed);
    }
}

#[test]
fn a_chain_that_is_too_long_and_ends() {
    const DATA: u64 = 1500;
    let mut target = target();
    let placed = target.guest.place(IN, 0, 512);
    let table = target.guest.memory.regions[3].alloc(1 << 20, 16);
    let byte = placed.data[0].address;
    for index in 0..DATA + 2 {
        let (address, len, flags) = match index {
            0 => (placed.chain[0].address, HEADER, NEXT),
            last if last == DATA + 1 => (placed.status, 1, WRITE),
            _ => (byte, 1, WRITE | NEXT),
        };
        let next = (index + 1) as u16;
        let entry = Descriptor {
            address,
            len,
            flags,
            next,
        };
        entry.write(&target.guest.memory, table, index);
    }
    let head = Descriptor {
        address: table,
        len: 1 << 20,
        flags: INDIRECT,
        next: 0,
    };
    target.assert_table(Refused, &[head], &placed);
}

#[test]
fn a_misaligned_indirect_table_is_served() {
    let mut target = target();
    let placed = target.guest.place(IN, 5, 512);
    let table = target.guest.queues[0].reserve_table() + 7;
    for (index, entry) in (0..).zip(linked(&placed, 0)) {
        let mut bytes = entry.address.to_le_bytes().to_vec();
        bytes.extend(entry.len.to_le_bytes());
        bytes.extend(entry.flags.to_le_bytes());
        bytes.extend(entry.next.to_le_bytes());
        target.guest.memory.write(table + 16 * index, &bytes);
    }
    let heads = target.guest.queues[0].reserve(1);
    let head = Descriptor {
        address: table,
        len: 48,
        flags: INDIRECT,
        next: 0,
    };
    target.guest.queues[0].ring.describe(heads[0], head);
    target.guest.queues[0].offer(heads, None);
    let verdict = target.verdict(&placed.chain, placed.status);
    assert_eq!(verdict, Served);
    let data = target.guest.memory.read(placed.data[0].address, 512);
    assert_eq!(difference(&data, target.disk.expected(5, 512)), None);
    target.assert_well(&verdict);
}

#[test]
fn an_indirect_table_that_was_not_negotiated() {
    let mut wanted = Wanted::all();
    wanted.features &= !feature::INDIRECT;
    let mut target = target_with(wanted);
    let placed = target.guest.place(IN, 0, 512);
    target.assert(Stopped, placed, Layout::Indirect);
}
