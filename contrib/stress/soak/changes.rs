//! A writable device's queues: requests of all kinds, each checked against a model, and what must be
//! on the disk in the end.

use super::counts::Counts;
use common::blk::SECTOR;
use common::guest::Guest;
use common::mixed::Mixed;

/// Requests in flight on each queue.
pub const DEPTH: usize = 16;

/// Requests in one turn.
const TURN: u64 = 300;

/// Bytes of the disk that are looked at in one go.
const STEP: usize = 128 << 10;

/// Does requests for a while, and waits for the last answer. Panics if one is wrong.
pub fn turn(mixed: &mut Mixed, counts: &Counts) {
    mixed.run(TURN);
    counts.changes.add(TURN);
}

/// Reads the whole disk through `guest`, which must hold `model`.
pub fn verify(guest: &mut Guest, model: &[u8], counts: &Counts) {
    for (at, expected) in (0..).zip(model.chunks(STEP)) {
        let sector = at * STEP as u64 / SECTOR;
        match guest.read(0, sector, expected.len() as u32) == expected {
            true => counts.verified.add(1),
            false => counts.mismatches.add(1),
        }
    }
}
