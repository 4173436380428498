//! Requests one at a time (virtio 1.2, section 5.2.6).

use super::{assert_beginning, assert_disk, part, write};
use common::blk::{
    DISCARD, FLUSH, GET_ID, IN, IOERR, OK, OUT, SECTOR, UNMAP, UNSUPP, WRITE_ZEROES, range,
};
use common::checks::scattered_read;
use common::content::{Random, difference, tagged};
use common::queue::{Layout, Segment};
use common::session::feature;
use common::writable::Writable;

#[test]
fn what_is_offered_in_place_of_read_only() {
    let disk = Writable::serve();
    let mut guest = disk.plain_guest();
    let expected = feature::VERSION_1
        | feature::SEG_MAX
        | feature::BLK_SIZE
        | feature::TOPOLOGY
        | feature::MQ
        | feature::FLUSH
        | feature::CONFIG_WCE
        | feature::DISCARD
        | feature::WRITE_ZEROES
        | feature::INDIRECT
        | feature::EVENT_IDX
        | feature::PROTOCOL;
    let found = guest.session.features;
    assert_eq!(found, expected, "{found:#x}, expected {expected:#x}");

    let space = guest.session.config(0, 60).unwrap();
    let field = |at: usize| u32::from_le_bytes(space[at..at + 4].try_into().unwrap());
    assert_eq!(
        guest.session.capacity().unwrap(),
        disk.content.len() as u64 / SECTOR
    );
    assert_eq!(space[32], 1, "writeback");
    assert!(field(36) >= 2048, "max_discard_sectors");
    assert!(field(40) >= 1, "max_discard_seg");
    assert_eq!(field(44), 8, "discard_sector_alignment");
    assert!(field(48) >= 2048, "max_write_zeroes_sectors");
    assert!(field(52) >= 1, "max_write_zeroes_seg");
    assert_eq!(space[56], 1, "write_zeroes_may_unmap");
}

/// Writes, discards and zeroes of any size and place, read back in parts, with the daemon restarted
/// one way or the other now and then.
#[test]
fn the_disk_reads_as_what_was_written() {
    let mut disk = Writable::serve();
    let mut model = disk.content.to_vec();
    let sectors = model.len() as u64 / SECTOR;
    let mut random = Random::new(7);
    for round in 0..6 {
        let mut guest = disk.plain_guest();
        for _ in 0..120 {
            let longest = if random.coin() { 12 } else { 700 };
            let count = random.within(1..=longest);
            // Half of them in one corner, so that they overlap.
            let within = if random.coin() { 2000 } else { sectors };
            let sector = random.within(0..=within - count);
            match random.below(8) {
                0 => {
                    let ranges = range(sector, count as u32, 0);
                    assert_eq!(guest.send(0, DISCARD, 0, &ranges), OK);
                    part(&mut model, sector, count).fill(0);
                }
                1 => {
                    let flags = if random.coin() { UNMAP } else { 0 };
                    let ranges = range(sector, count as u32, flags);
                    assert_eq!(guest.send(0, WRITE_ZEROES, 0, &ranges), OK);
                    part(&mut model, sector, count).fill(0);
                }
                2 => guest.flush(0),
                _ => {
                    let data = tagged((count * SECTOR) as usize, random.any());
                    write(&mut guest, &mut model, sector, &data);
                }
            }
            let before = sector.saturating_sub(random.below(9));
            let len = (count + random.below(20)).min(sectors - before);
            let placed = scattered_read(&mut guest, &mut random, before, (len * SECTOR) as u32);
            let answer = guest.run(0, &placed, Layout::Indirect);
            assert_eq!(answer.status, OK);
            let wrong = difference(&answer.data, part(&mut model, before, len));
            assert_eq!(wrong, None, "{len} sectors from {before}");
        }
        assert_disk(&mut guest, &model);
        match round % 3 {
            0 => disk.crash(),
            1 => disk.stop_and_start(),
            _ => {
                guest.flush(0);
                disk.lose_power();
            }
        }
    }
    assert_disk(&mut disk.plain_guest(), &model);
}

#[test]
fn many_ranges_in_one_request() {
    let disk = Writable::serve();
    let mut guest = disk.plain_guest();
    let mut model = disk.content.to_vec();
    for (kind, flags, at) in [
        (DISCARD, 0, 100),
        (WRITE_ZEROES, UNMAP, 5000),
        (WRITE_ZEROES, 0, 9000),
    ] {
        let ranges: Vec<u8> = (0..32)
            .flat_map(|i| range(at + i * 31, i as u32, flags))
            .collect();
        for i in 0..32 {
            part(&mut model, at + i * 31, i).fill(0);
        }
        assert_eq!(guest.send(0, kind, 0, &ranges), OK);
    }
    assert_beginning(&mut guest, &model);
}

#[test]
fn what_breaks_a_rule_changes_nothing() {
    let disk = Writable::serve();
    let mut guest = disk.plain_guest();
    let last = disk.content.len() as u64 / SECTOR;
    let data = [7; 2 * SECTOR as usize];
    for (kind, sector, data, status) in [
        (OUT, last, &data[..512], IOERR),
        (OUT, last - 1, &data[..], IOERR),
        (OUT, u64::MAX, &data[..], IOERR),
        (OUT, 1 << 55, &data[..], IOERR),
        (OUT, 0, &data[..1], IOERR),
        (OUT, 0, &data[..511], IOERR),
        (OUT, 0, &data[..513], IOERR),
        (OUT, last + 1, &[], IOERR),
        (DISCARD, 0, &[], IOERR),
        (DISCARD, 0, &range(0, 1, 0)[..15], IOERR),
        (DISCARD, 0, &[&range(0, 1, 0)[..], &[0; 8]].concat(), IOERR),
        (DISCARD, 0, &range(0, 1, 0).repeat(33), IOERR),
        (DISCARD, 0, &range(0, (4 << 20) + 1, 0), IOERR),
        (DISCARD, 0, &range(0, u32::MAX, 0), IOERR),
        (DISCARD, 0, &range(last, 1, 0), IOERR),
        (DISCARD, 0, &range(last - 1, 2, 0), IOERR),
        (DISCARD, 0, &range(u64::MAX, 1, 0), IOERR),
        (DISCARD, 0, &range(0, 1, UNMAP), UNSUPP),
        (DISCARD, 0, &range(0, 1, 2), UNSUPP),
        // None of them is done if one is wrong.
        (
            DISCARD,
            0,
            &[range(0, 1, 0), range(last, 1, 0)].concat(),
            IOERR,
        ),
        (
            WRITE_ZEROES,
            0,
            &[range(0, 1, 1), range(9, 1, 1 << 31)].concat(),
            UNSUPP,
        ),
        (WRITE_ZEROES, 0, &range(0, 1, 3), UNSUPP),
        (WRITE_ZEROES, 0, &range(last - 1, 2, UNMAP), IOERR),
        (WRITE_ZEROES, 0, &[], IOERR),
    ] {
        let found = guest.send(0, kind, sector, data);
        assert_eq!(
            found,
            status,
            "type {kind}, sector {sector}, {} bytes",
            data.len()
        );
    }
    assert_disk(&mut guest, &disk.content);
}

#[test]
fn nothing_to_do_succeeds() {
    let disk = Writable::serve();
    let mut guest = disk.plain_guest();
    let last = disk.content.len() as u64 / SECTOR;
    assert_eq!(guest.send(0, OUT, last, &[]), OK);
    assert_eq!(guest.send(0, DISCARD, 0, &range(last, 0, 0)), OK);
    assert_eq!(guest.send(0, WRITE_ZEROES, 0, &range(0, 0, UNMAP)), OK);
    assert_eq!(guest.send(0, FLUSH, 0, &[]), OK);
    assert_beginning(&mut guest, &disk.content);
}

#[test]
fn the_first_and_the_last_sector() {
    let disk = Writable::serve();
    let mut guest = disk.plain_guest();
    let mut model = disk.content.to_vec();
    let last = model.len() as u64 / SECTOR - 1;
    for sector in [0, last] {
        let data = tagged(SECTOR as usize, sector);
        write(&mut guest, &mut model, sector, &data);
    }
    assert_disk(&mut guest, &model);
    assert_eq!(
        guest.send(0, DISCARD, 0, &range(0, (last + 1) as u32, 0)),
        OK
    );
    model.fill(0);
    assert_disk(&mut guest, &model);
}

#[test]
fn data_in_as_many_descriptors_as_a_queue_holds() {
    let disk = Writable::serve();
    let mut guest = disk.plain_guest();
    let data = tagged(126 * 512, 3);
    let mut whole = guest.place_data(OUT, 501, &data);
    let start = whole.data[0].address;
    let pieces = (0..126).map(|part| Segment::readable(start + part * 512, 512));
    whole.chain.splice(1..2, pieces);
    assert_eq!(guest.run(0, &whole, Layout::Direct).status, OK);
    assert_eq!(difference(&guest.read(0, 501, 126 * 512), &data), None);
    // Header and data in one descriptor, cut at an odd byte.
    let mut whole = guest.place(OUT, 700, 2048 + 16);
    let at = whole.data[0].address;
    let header = common::blk::header(OUT, 700);
    guest.memory.write(at, &header);
    guest.memory.write(at + 16, &data[..2048]);
    let cut = [
        Segment::readable(at, 16 + 777),
        Segment::readable(at + 16 + 777, 2048 - 777),
    ];
    whole.chain.splice(0..2, cut);
    assert_eq!(guest.run(0, &whole, Layout::Indirect).status, OK);
    assert_eq!(difference(&guest.read(0, 700, 2048), &data[..2048]), None);
}

#[test]
fn reads_and_names_are_as_on_a_read_only_disk() {
    let disk = Writable::serve();
    let mut guest = disk.plain_guest();
    common::checks::scattered_reads(&mut guest, 0, &disk.content, 100, 5);
    let id = guest.request(0, GET_ID, 0, 20);
    assert_eq!((id.status, id.len), (OK, 21));
    for kind in [2, 3, 5, 9, 10, 14, 99, u32::MAX] {
        assert_eq!(guest.request(0, kind, 0, 512).status, UNSUPP, "type {kind}");
    }
    let beyond = guest.request(0, IN, disk.content.len() as u64 / SECTOR, 512);
    assert_eq!(beyond.status, IOERR);
}
