//! Memory that changes while the device uses it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use super::*;
use common::PATIENCE;
use common::blk::{self, FILL};
use common::content::Random;

/// Bytes on either side of the data that the device must not write.
const GUARD: u64 = 4096;
const DATA: u32 = 4096;

/// The memory of one request, and the table that names it.
struct Ground {
    memory: Memory,
    table: u64,
    header: u64,
    guarded: u64,
    status: u64,
}

impl Ground {
    fn new(memory: &Memory, table: u64) -> Self {
        let [low, high] = [&memory.regions[0], &memory.regions[3]];
        let guarded = high.alloc(2 * GUARD + u64::from(DATA), 4096);
        memory.write(guarded, &[FILL; 3 * 4096]);
        Self {
            memory: memory.clone(),
            table,
            header: low.alloc(u64::from(HEADER), 16),
            guarded,
            status: low.alloc(1, 1),
        }
    }

    /// Three descriptors that make a read; `random` puts something else into some of their fields.
    fn describe(&self, random: &mut Random) {
        let sane = [
            (self.header, HEADER, NEXT),
            (self.guarded + GUARD, DATA, NEXT | WRITE),
            (self.status, 1, WRITE),
        ];
        for (index, (address, len, flags)) in (0..).zip(sane) {
            let pick = |random: &mut Random, sane: u64, others: &[u64]| {
                let which = random.below(3 * others.len() as u64) as usize;
                others.get(which).copied().unwrap_or(sane)
            };
            let address = pick(random, address, &[Memory::HOLE, u64::MAX - 8]);
            // Never longer than what lies at the address, or far beyond all memory.
            let len = pick(random, len.into(), &[0, 1, u32::MAX.into()]) as u32;
            let flags = pick(random, flags.into(), &[0, 1, 2, 3, 4, 5, 7]) as u16;
            let next = pick(random, index + 1, &[0, 1, 2, 127, 128, 0xffff]) as u16;
            let descriptor = Descriptor {
                address,
                len,
                flags,
                next,
            };
            descriptor.write(&self.memory, self.table, index);
        }
        let kind = [IN, blk::OUT, blk::GET_ID, 77][random.below(4) as usize];
        let sector = [0, 9, u64::MAX, 1 << 40][random.below(4) as usize];
        self.memory.write(self.header, &blk::header(kind, sector));
    }

    fn assert_guards(&self) {
        for guard in [self.guarded, self.guarded + GUARD + u64::from(DATA)] {
            let found = self.memory.read(guard, GUARD as usize);
            assert!(found.iter().all(|byte| *byte == FILL), "beyond the buffer");
        }
    }
}

#[test]
fn descriptors_and_headers_that_change_all_the_time() {
    let mut target = target();
    let ground = Ground::new(&target.guest.memory, target.guest.queues[0].table());
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut random = Random::new(3);
            while !done.load(Ordering::Relaxed) {
                ground.describe(&mut random);
            }
        });
        let stop = Stop(&done);
        let (mut answers, mut stops) = (0, 0);
        for round in 0..5000 {
            target.guest.queues[0].ring.offer(0);
            target.guest.queues[0].ring.publish();
            let start = Instant::now();
            loop {
                let ring = &mut target.guest.queues[0].ring;
                if let Some(used) = ring.take() {
                    assert_eq!(used.head, 0);
                    answers += 1;
                    break;
                }
                if ring.vring.err.read().is_ok() {
                    stops += 1;
                    target.guest.reset_queue(0).expect("reset");
                    break;
                }
                assert!(start.elapsed() < PATIENCE, "no answer in round {round}");
                thread::yield_now();
            }
            if round % 500 == 0 {
                target.guest.assert_reads(1, &target.disk.content);
            }
        }
        drop(stop);
        assert_eq!(answers + stops, 5000);
        assert!(answers > 0 && stops > 0, "{answers} answers, {stops} stops");
    });
    ground.assert_guards();
    target.guest.reset_queue(0).expect("reset");
    target.assert_well(&Served);
}

/// Ends the other thread, however the test ends.
struct Stop<'f>(&'f AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
