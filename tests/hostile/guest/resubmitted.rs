//! Bad chains that an earlier daemon took and did not answer: marked in the in-flight region.

use std::os::unix::fs::FileExt;

use super::*;
use common::returning::Returning;

/// Offers a chain of which descriptor `part` lies outside of memory, marked as taken by a daemon
/// that died. Returns the guest's side, connected.
fn resubmitted(part: usize) -> (Disk, Guest, Placed) {
    let disk = Disk::serve();
    let mut guest = Guest::boot(disk.daemon.connect(), Options::default()).expect("guest");
    let mut placed = guest.place(IN, 0, 512);
    placed.chain[part].address = Memory::HOLE;
    guest.session.stop_queue(0).expect("stop");
    let head = guest.queues[0].submit(&placed.chain, Layout::Direct);
    guest.queues[0].ring.publish_quietly();
    drop(guest.session);

    let vring = guest.queues[0].ring.vring.clone();
    let mut front_end = Returning::new(guest.memory.clone(), vec![vring]);
    let region = front_end.region(&disk.daemon);
    // The header's version and size, then the entry's mark.
    region.write_all_at(&1u16.to_le_bytes(), 8).expect("region");
    region
        .write_all_at(&128u16.to_le_bytes(), 10)
        .expect("region");
    region
        .write_all_at(&[1], 16 + 16 * u64::from(head))
        .expect("region");
    guest.session = front_end.connect(disk.daemon.connect());
    (disk, guest, placed)
}

#[test]
fn with_data_outside_of_memory_it_is_refused() {
    let (disk, mut guest, placed) = resubmitted(1);
    let used = guest.queues[0].wait();
    assert_eq!(used.len, 1);
    assert_eq!(guest.memory.read(placed.status, 1), [IOERR]);
    guest.assert_reads(0, &disk.content);
}

/// Every start of the queue meets it again, and none answers it.
#[test]
fn with_the_status_outside_of_memory_it_stops_the_queue() {
    let (mut disk, mut guest, _) = resubmitted(2);
    for _ in 0..3 {
        assert_eq!(guest.queues[0].wait_event(), Event::Stopped);
        assert_eq!(guest.queues[0].ring.vring.used_index(), 0);
        guest.session.stop_queue(0).expect("stop");
        guest.start_queue(0).expect("start");
    }
    disk.daemon.assert_alive();
    let lines = disk.daemon.log().lines().count();
    assert!(lines < 20, "{lines} lines");
}
