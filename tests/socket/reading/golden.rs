//! Every golden stack, served by the daemon and read through the socket.

use common::blk::SECTOR;
use common::checks;
use common::daemon::Daemon;
use common::disk::{content, sha256};
use common::golden::{self, Case};
use common::guest::{Guest, Options};
use common::load::{Load, Shape};
use common::memory::Memory;
use common::ring::{Addresses, Ring};
use common::session::{Session, Wanted, feature};

/// The whole disk: in pieces of 64 KiB at depth, the last part of it in sectors.
fn read_all(daemon: &Daemon, case: &Case) -> Vec<u8> {
    let len = case.size as usize;
    let mut session = Session::negotiate(daemon.connect(), Wanted::all()).expect("session");
    let sectors = session.capacity().expect("config space");
    assert_eq!(sectors, case.size / SECTOR, "{}: capacity", case.name);
    let memory = Memory::typical();
    session.share(&memory).expect("memory");
    let mut read = |index: usize, region: usize, piece: u32| {
        let at = Addresses::alloc(&memory, 64, [0, 1, 2]);
        let ring = Ring::new(&memory, at, 64, session.has(feature::EVENT_IDX));
        session.start_queue(index, &ring.vring, 0).expect("queue");
        let shape = Shape {
            depth: 16,
            len: piece,
            segments: 2,
            indirect: false,
        };
        let mut load = Load::new(ring, &memory, region, shape);
        checks::whole_disk(&mut load, shape, len)
    };
    const PIECE: u32 = 64 << 10;
    let mut disk = read(0, 0, PIECE);
    let rest = len % PIECE as usize;
    if rest > 0 {
        // Small or odd disks, read whole in sectors.
        let by_sectors = read(1, 3, SECTOR as u32);
        let from = len - rest;
        disk[from..].copy_from_slice(&by_sectors[from..]);
    }
    disk
}

/// The stacks that are whole and need no writable layer.
fn stacks() -> impl Iterator<Item = Case> {
    let read_only = |case: &Case| !case.has_upper && !case.name.starts_with("14");
    golden::cases().into_iter().filter(read_only)
}

#[test]
fn every_golden_stack_hashes_to_what_its_writer_wrote() {
    for case in stacks() {
        let daemon = Daemon::serve(&case.layers);
        let disk = read_all(&daemon, &case);
        assert_eq!(sha256(&disk), case.sha256, "{}", case.name);
    }
}

#[test]
fn random_reads_of_every_golden_stack_equal_it_byte_for_byte() {
    for (seed, case) in (1..).zip(stacks()) {
        let content = content(&case);
        let daemon = Daemon::serve(&case.layers);
        let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
        checks::scattered_reads(&mut guest, 0, &content, 60, seed);
    }
}
