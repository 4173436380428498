//! What any read-only back-end must do, whichever it is: checks shared by several tests.

use super::blk::{self, SECTOR};
use super::content::{Random, difference};
use super::guest::{Guest, Placed};
use super::load::{Load, Shape};
use super::queue::{Layout, Segment};

/// Reads the whole disk through the load's ring, `shape.depth` requests in flight.
pub fn whole_disk(load: &mut Load, shape: Shape, len: usize) -> Vec<u8> {
    let mut disk = vec![0; len];
    let step = u64::from(shape.len) / SECTOR;
    let whole = len as u64 / SECTOR / step * step;
    let mut sectors = (0..whole).step_by(step as usize);
    load.run(
        || sectors.next(),
        |done| {
            assert_eq!(done.status, blk::OK, "read at sector {}", done.sector);
            assert_eq!(
                done.len,
                shape.len + 1,
                "bytes written at sector {}",
                done.sector
            );
            let start = (done.sector * SECTOR) as usize;
            done.data
                .copy_to(&mut disk[start..start + shape.len as usize]);
        },
    );
    disk
}

/// Reads random places through the load's ring and compares each with `expected`.
pub fn random_load(
    load: &mut Load,
    shape: Shape,
    expected: &[u8],
    count: u64,
    random: &mut Random,
) {
    let last = (expected.len() as u64 - u64::from(shape.len)) / SECTOR;
    let mut left = count;
    let mut answered = 0;
    let mut buffer = vec![0; shape.len as usize];
    load.run(
        || {
            left = left.checked_sub(1)?;
            Some(random.within(0..=last))
        },
        |done| {
            assert_eq!(done.status, blk::OK, "read at sector {}", done.sector);
            done.data.copy_to(&mut buffer);
            let start = (done.sector * SECTOR) as usize;
            let wrong = difference(&buffer, &expected[start..start + buffer.len()]);
            assert_eq!(wrong, None, "read at sector {}", done.sector);
            answered += 1;
        },
    );
    assert_eq!(answered, count, "each request answered once");
}

/// Lays out a read the way a strange but lawful driver might: header, data and status cut and
/// spread over descriptors and regions at random.
pub fn scattered_read(guest: &mut Guest, random: &mut Random, sector: u64, len: u32) -> Placed {
    guest.scratch.clear();
    let mut chain = Vec::new();
    let header = blk::header(blk::IN, sector);
    let cuts = random.within(1..=4);
    let mut rest = &header[..];
    for cut in 1..=cuts {
        let most = rest.len() as u64 - (cuts - cut);
        let part = if cut == cuts {
            most
        } else {
            random.within(1..=most)
        };
        let (now, later) = rest.split_at(part as usize);
        let span = random.below(guest.scratch.spans());
        let address = guest.scratch.put(span, now, random.below(9));
        chain.push(Segment::readable(address, now.len() as u32));
        rest = later;
    }

    let mut data = Vec::new();
    let pieces = random.within(1..=12).min(u64::from(len));
    let mut left = len;
    for piece in 1..=pieces as u32 {
        let most = left - (pieces as u32 - piece);
        let part = match piece == pieces as u32 {
            true => most,
            false if random.coin() => most.min(SECTOR as u32 * random.within(1..=8) as u32),
            false => random.within(1..=most.into()) as u32,
        };
        let span = random.below(guest.scratch.spans());
        let address = guest.scratch.take(span, part, random.below(600));
        data.push(Segment::writable(address, part));
        left -= part;
    }
    chain.extend(&data);

    // The status may follow the last data byte in its descriptor, or have one of its own.
    let status = if random.coin() {
        let shared = chain.last_mut().expect("data descriptor");
        let after = guest.scratch.take_after(shared.address, shared.len);
        match after {
            Some(address) => {
                shared.len += 1;
                address
            }
            None => push_status(guest, &mut chain, random),
        }
    } else {
        push_status(guest, &mut chain, random)
    };
    Placed {
        chain,
        data,
        status,
    }
}

fn push_status(guest: &mut Guest, chain: &mut Vec<Segment>, random: &mut Random) -> u64 {
    let span = random.below(guest.scratch.spans());
    let status = guest
        .scratch
        .put(span, &[blk::UNANSWERED], random.below(70));
    chain.push(Segment::writable(status, 1));
    status
}

/// Reads random ranges, laid out at random, one at a time, and compares each with `expected`.
pub fn scattered_reads(guest: &mut Guest, queue: usize, expected: &[u8], count: u64, seed: u64) {
    let mut random = Random::new(seed);
    let sectors = expected.len() as u64 / SECTOR;
    for round in 0..count {
        let longest = sectors.min(if random.coin() { 16 } else { 512 });
        let count = random.within(1..=longest);
        let sector = random.within(0..=sectors - count);
        let len = (count * SECTOR) as u32;
        let placed = scattered_read(guest, &mut random, sector, len);
        let layout = match random.below(3) {
            0 => Layout::Direct,
            1 => Layout::Indirect,
            _ => Layout::Mixed(random.within(1..=placed.chain.len() as u64 - 1) as usize),
        };
        let answer = guest.run(queue, &placed, layout);
        let what = format!("seed {seed} round {round}: {len} bytes at sector {sector}, {layout:?}");
        assert_eq!(answer.status, blk::OK, "{what}");
        assert_eq!(answer.len, len + 1, "{what}: bytes written");
        let start = (sector * SECTOR) as usize;
        let wrong = difference(&answer.data, &expected[start..start + len as usize]);
        assert_eq!(wrong, None, "{what}");
    }
}
