//! A disk that can be written to, through the socket.

mod cache;
mod control;
mod crash;
mod faults;
mod full;
mod growing;
mod hostile;
mod load;
mod pausing;
mod requests;
mod setup;

use common::blk::{self, IN, OK, SECTOR};
use common::content::difference;
use common::guest::Guest;
use common::queue::Layout;

/// Bytes read at a time.
const PIECE: usize = 256 << 10;

/// Asserts that the whole disk reads as `model`.
fn assert_disk(guest: &mut Guest, model: &[u8]) {
    for (number, piece) in (0..).zip(model.chunks(PIECE)) {
        let sector = number * (PIECE as u64 / SECTOR);
        let placed = guest.place(IN, sector, piece.len() as u32);
        let used = guest.queues[0].run(&placed.chain, Layout::Direct);
        let answer = guest.answer(&placed, used);
        assert_eq!(answer.status, OK, "from sector {sector}");
        let wrong = difference(&answer.data, piece);
        assert_eq!(wrong, None, "from sector {sector}");
    }
}

/// Asserts that the beginning of the disk, which small tests stay in, reads as `model` has it.
fn assert_beginning(guest: &mut Guest, model: &[u8]) {
    assert_disk(guest, &model[..24 * PIECE]);
}

/// The part of `bytes` that `sectors` sectors from `sector` on are.
fn part(bytes: &mut [u8], sector: u64, sectors: u64) -> &mut [u8] {
    &mut bytes[(sector * SECTOR) as usize..((sector + sectors) * SECTOR) as usize]
}

/// Writes `data` at `sector`, to the disk and to `model`.
fn write(guest: &mut Guest, model: &mut [u8], sector: u64, data: &[u8]) {
    guest.write(0, sector, data);
    part(model, sector, data.len() as u64 / SECTOR).copy_from_slice(data);
}

/// Lets `kind`, which is DISCARD or WRITE_ZEROES, make zeros of sectors, on the disk and in `model`.
fn zero(guest: &mut Guest, model: &mut [u8], kind: u32, sector: u64, sectors: u32, unmap: bool) {
    let range = blk::range(sector, sectors, u32::from(unmap));
    assert_eq!(guest.send(0, kind, 0, &range), OK);
    part(model, sector, u64::from(sectors)).fill(0);
}
