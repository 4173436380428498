//! Crashes with a front-end that keeps no in-flight region: what was answered is there, and what was
//! not is old or new, sector by sector.

use std::fs::File;

use vhost::VhostBackend;

use super::{assert_beginning, part, write};
use common::blk::{self, DISCARD, IN, OK, OUT, SECTOR, range};
use common::content::{Random, difference, tagged};
use common::queue::{Event, Layout, Segment};
use common::writable::Writable;

#[test]
fn what_was_not_answered_is_old_or_new() {
    let mut disk = Writable::serve();
    let mut model = disk.content.to_vec();
    let mut random = Random::new(11);
    for round in 0..25 {
        let mut guest = disk.plain_guest();
        let before = tagged(500 * SECTOR as usize, round);
        write(&mut guest, &mut model, 3, &before);
        let answered = tagged(100 * SECTOR as usize, round + 1000);
        write(&mut guest, &mut model, 1003 + round, &answered);

        let new = tagged(400 * SECTOR as usize, round + 2000);
        let placed = guest.place_data(OUT, 50, &new);
        guest.queues[0].submit(&placed.chain, Layout::Direct);
        guest.queues[0].publish();
        std::thread::sleep(std::time::Duration::from_micros(random.below(2000)));
        disk.crash();
        let mut guest = disk.plain_guest();
        let found = guest.read(0, 50, new.len() as u32);
        let sector = SECTOR as usize;
        let old = part(&mut model, 50, 400);
        for (at, now) in found.chunks(sector).enumerate() {
            let range = at * sector..(at + 1) * sector;
            let lawful = now == &old[range.clone()] || now == &new[range];
            assert!(
                lawful,
                "round {round}: sector {} is neither old nor new",
                50 + at
            );
        }
        old.copy_from_slice(&found);
        assert_beginning(&mut guest, &model);
    }
}

/// A front-end that cuts its memory while a write is under way loses its connection, and nothing
/// else.
#[test]
fn memory_cut_short_under_a_write() {
    let mut disk = Writable::serve();
    let mut guest = disk.plain_guest();
    let data = tagged(65536, 1);
    guest.write(0, 0, &data);
    // The data alone is gone at first: rings, header and status lie in other regions.
    let mut placed = guest.place(OUT, 8, 512);
    let at = guest.memory.regions[2].alloc(65536, 4096);
    placed.chain[1] = Segment::readable(at, 65536);
    guest.queues[0].submit(&placed.chain, Layout::Direct);
    guest.memory.regions[2].file().set_len(0).expect("cut");
    guest.queues[0].ring.publish();
    match guest.queues[0].wait_event() {
        Event::Used(_) => {
            let status = guest.memory.read(placed.status, 1)[0];
            assert_eq!(status, blk::IOERR);
        }
        Event::Stopped => {}
    }
    drop(guest);
    let mut guest = disk.plain_guest();
    let found = guest.read(0, 0, 65536);
    assert_eq!(difference(&found[..8 * 512], &data[..8 * 512]), None);
    guest.write(0, 8, &data);
    assert_eq!(difference(&guest.read(0, 8, 65536), &data), None);
    disk.daemon.assert_alive();

    let mut guest = disk.plain_guest();
    let placed = guest.place_data(OUT, 8, &data);
    guest.queues[0].submit(&placed.chain, Layout::Direct);
    for region in &guest.memory.regions {
        region.file().set_len(0).expect("cut");
    }
    guest.queues[0].ring.vring.kick.write(1).expect("kick");
    let start = std::time::Instant::now();
    while guest.session.frontend.get_features().is_ok() {
        let patience = common::PATIENCE;
        assert!(
            start.elapsed() < patience,
            "the connection goes on without its memory"
        );
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    disk.daemon.assert_alive();
    assert_eq!(
        difference(&disk.plain_guest().read(0, 8, 65536), &data),
        None
    );
}

/// Zeros that stand in for memory that is gone are not written to the disk.
#[test]
fn memory_found_to_be_cut_short_before_a_write() {
    let disk = Writable::serve();
    let mut guest = disk.plain_guest();
    let data = tagged(65536, 1);
    guest.write(0, 0, &data);
    // The answer to the first request goes where the data of the second is; all else lies in other
    // regions.
    let cut = guest.memory.regions[2].clone();
    let mut name = guest.place(blk::GET_ID, 0, 20);
    name.chain[1] = Segment::writable(cut.alloc(4096, 4096), 20);
    let kept = guest.memory.regions[1].clone();
    let header = kept.alloc(16, 16);
    guest.memory.write(header, &blk::header(OUT, 8));
    let data_at = cut.alloc(4096, 4096);
    guest.memory.write(data_at, &[0x5a; 4096]);
    let write = [
        Segment::readable(header, blk::HEADER),
        Segment::readable(data_at, 4096),
        Segment::writable(kept.alloc(1, 1), 1),
    ];
    guest.queues[0].submit(&name.chain, Layout::Direct);
    guest.queues[0].submit(&write, Layout::Direct);
    cut.file().set_len(0).expect("cut");
    guest.queues[0].ring.publish();
    assert!(matches!(guest.queues[0].wait_event(), Event::Stopped));
    drop(guest);
    let found = disk.plain_guest().read(0, 0, 65536);
    assert_eq!(difference(&found, &data), None);
}

/// What a front-end that replaces another reads is what the one before wrote.
#[test]
fn another_front_end_reads_what_was_written() {
    let disk = Writable::serve();
    let mut model = disk.content.to_vec();
    let mut first = disk.plain_guest();
    let data = tagged(4096, 9);
    first.write(0, 77, &data);
    part(&mut model, 77, 8).copy_from_slice(&data);
    let mut second = disk.plain_guest();
    assert_eq!(second.send(0, DISCARD, 0, &range(80, 2, 0)), OK);
    part(&mut model, 80, 2).fill(0);
    assert_eq!(second.request(0, IN, 0, 512).status, OK);
    assert_beginning(&mut second, &model);
}

/// The files are one daemon's alone.
#[test]
fn a_second_daemon_is_refused() {
    let disk = Writable::serve();
    let socket = disk.file("second.sock");
    let (case, _) = common::disk::deep();
    let layers = case
        .layers
        .iter()
        .map(|layer| layer.to_str().expect("UTF-8"));
    let layers = layers.collect::<Vec<_>>().join(",");
    let folder = disk.file("");
    let output = common::daemon::run([
        "--socket",
        socket.to_str().expect("UTF-8"),
        "--layers",
        &layers,
        "--upper-auto",
        folder.to_str().expect("UTF-8"),
    ]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("in use"), "{said}");
    drop(File::open(disk.file("upper.data")).expect("the layer is left alone"));
}
