//! What is durable when. A power loss is played by taking away what lasts only while the system
//! runs.

use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

use super::{assert_beginning, write, zero};
use common::blk::{self, DISCARD, OK, OUT, SECTOR, Scratch, WRITE_ZEROES};
use common::content::{difference, tagged};
use common::guest::{Guest, Options};
use common::memory::Memory;
use common::queue::{Layout, Queue, Segment};
use common::returning::Returning;
use common::session::{Wanted, feature};
use common::writable::Writable;

const LEN: usize = 16 * SECTOR as usize;

/// A guest whose driver takes all features but these.
fn guest_without(disk: &Writable, bits: u64) -> Guest {
    let mut wanted = Wanted::all();
    wanted.features &= !bits;
    disk.guest(Options {
        wanted,
        ..Options::default()
    })
}

fn set_writeback(guest: &mut Guest, value: u8) {
    let flags = VhostUserConfigFlags::WRITABLE;
    let set = guest.session.frontend.set_config(32, flags, &[value]);
    set.expect("the one field that can be written");
    let shown = guest.session.config(32, 1).unwrap();
    assert_eq!(shown, [value]);
}

#[test]
fn what_a_flush_covers_outlives_a_power_loss() {
    let mut disk = Writable::serve();
    let mut model = disk.content.to_vec();
    let mut guest = disk.plain_guest();
    let data = tagged(LEN, 1);
    write(&mut guest, &mut model, 1000, &data);
    zero(&mut guest, &mut model, DISCARD, 2000, 9, false);
    zero(&mut guest, &mut model, WRITE_ZEROES, 1003, 5, false);
    guest.flush(0);
    // Not covered: this test would not notice a flush that does nothing if it was there.
    guest.write(0, 5000, &data);
    disk.lose_power();
    let mut guest = disk.plain_guest();
    assert!(difference(&guest.read(0, 5000, LEN as u32), &data).is_some());
    assert_beginning(&mut guest, &model);
}

/// Without FLUSH and CONFIG_WCE, as Firecracker's default has it; and with the latter, switched
/// off.
#[test]
fn who_cannot_flush_or_does_not_want_to_has_writes_durable_when_answered() {
    for round in 0..3 {
        let mut disk = Writable::serve();
        let mut model = disk.content.to_vec();
        let mut guest = match round {
            0 => guest_without(&disk, feature::FLUSH | feature::CONFIG_WCE),
            1 => guest_without(&disk, feature::FLUSH),
            _ => disk.plain_guest(),
        };
        match round {
            1 => assert_eq!(guest.session.config(32, 1).unwrap(), [0]),
            2 => set_writeback(&mut guest, 0),
            _ => {}
        }
        let data = tagged(LEN, round);
        write(&mut guest, &mut model, 1000, &data);
        zero(&mut guest, &mut model, DISCARD, 2000, 9, false);
        zero(&mut guest, &mut model, WRITE_ZEROES, 3000, 9, true);
        disk.lose_power();
        assert_beginning(&mut disk.plain_guest(), &model);
    }
}

/// A driver that knows FLUSH and not CONFIG_WCE flushes.
#[test]
fn writeback_goes_without_config_wce() {
    let mut disk = Writable::serve();
    let mut guest = guest_without(&disk, feature::CONFIG_WCE);
    let data = tagged(LEN, 1);
    guest.write(0, 1000, &data);
    disk.lose_power();
    let mut guest = disk.plain_guest();
    assert!(difference(&guest.read(0, 1000, LEN as u32), &data).is_some());
}

#[test]
fn switching_the_cache_off_makes_durable_what_was_written_and_on_again_is_on() {
    let mut disk = Writable::serve();
    let mut model = disk.content.to_vec();
    let mut guest = disk.plain_guest();
    let data = tagged(LEN, 1);
    write(&mut guest, &mut model, 1000, &data);
    set_writeback(&mut guest, 0);
    set_writeback(&mut guest, 1);
    guest.write(0, 7000, &data);
    disk.lose_power();
    let mut guest = disk.plain_guest();
    assert!(difference(&guest.read(0, 7000, LEN as u32), &data).is_some());
    assert_beginning(&mut guest, &model);
}

/// A driver that switched the cache off flushes no more, also after a restart of the daemon.
#[test]
fn a_cache_that_is_off_stays_off_when_the_daemon_is_started_again() {
    let mut disk = Writable::serve();
    let memory = Memory::typical();
    let mut queue = Queue::new(&memory, 128, true);
    let mut front_end = Returning::new(memory.clone(), vec![queue.ring.vring.clone()]);
    let mut session = front_end.connect(disk.daemon.connect());
    let flags = VhostUserConfigFlags::WRITABLE;
    for value in [0, 1, 0] {
        let set = session.frontend.set_config(32, flags, &[value]);
        set.expect("the write cache");
        disk.crash();
        session = front_end.connect(disk.daemon.connect());
        assert_eq!(session.config(32, 1).unwrap(), [value]);
    }
    let mut scratch = Scratch::new(&memory, 64 << 10);
    let data = tagged(LEN, 1);
    let chain = [
        Segment::readable(scratch.put(0, &blk::header(OUT, 1000), 0), blk::HEADER),
        Segment::readable(scratch.put(1, &data, 0), LEN as u32),
        Segment::writable(scratch.put(3, &[blk::UNANSWERED], 0), 1),
    ];
    queue.run(&chain, Layout::Direct);
    assert_eq!(memory.read(chain[2].address, 1), [OK]);
    drop(session);
    disk.lose_power();
    let mut guest = disk.plain_guest();
    assert_eq!(
        guest.session.config(32, 1).unwrap(),
        [1],
        "another guest's own"
    );
    assert_eq!(difference(&guest.read(0, 1000, LEN as u32), &data), None);
}

#[test]
fn other_fields_cannot_be_written() {
    let disk = Writable::serve();
    let mut guest = disk.plain_guest();
    let before = guest.session.config(0, 60).unwrap();
    let flags = VhostUserConfigFlags::WRITABLE;
    for (offset, bytes) in [(0, &[1u8; 8][..]), (33, &[9]), (36, &[0; 4]), (31, &[5])] {
        let set = guest.session.frontend.set_config(offset, flags, bytes);
        set.expect("ignored");
    }
    assert_eq!(guest.session.config(0, 60).unwrap(), before);
}

#[test]
fn a_clean_end_leaves_everything_durable() {
    let mut disk = Writable::serve();
    let mut model = disk.content.to_vec();
    let mut guest = disk.plain_guest();
    let data = tagged(LEN, 1);
    write(&mut guest, &mut model, 1000, &data);
    disk.stop_and_start();
    disk.lose_power();
    assert_beginning(&mut disk.plain_guest(), &model);
}
