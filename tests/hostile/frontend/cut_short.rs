//! Shared memory that is cut short under a running queue.

use super::*;

#[test]
fn memory_cut_short_under_a_running_queue() {
    let mut disk = Disk::serve();
    let mut guest = disk.guest(Options::default());
    guest.assert_reads(0, &disk.content);
    let placed = guest.place(IN, 0, 65536);
    guest.queues[0].submit(&placed.chain, Layout::Direct);
    for region in &guest.memory.regions {
        region.file().set_len(0).expect("cut");
    }
    // Whatever the device looks at now is gone. So it is for us: only descriptors from here on.
    guest.queues[0].ring.vring.kick.write(1).expect("kick");
    assert_hung_up(&guest);
    disk.assert_well();
}

/// Waits until the device ends the connection by itself.
fn assert_hung_up(guest: &Guest) {
    let start = Instant::now();
    while guest.session.frontend.get_features().is_ok() {
        assert!(
            start.elapsed() < PATIENCE,
            "the connection goes on without its memory"
        );
        thread::sleep(Duration::from_millis(1));
    }
}

fn memfd(len: u64) -> File {
    let fd = rustix::fs::memfd_create("area", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd");
    let file = File::from(fd);
    file.set_len(len).expect("length");
    file
}

/// A running guest, set up by `prepare` before its queue is started anew.
fn guest_with(disk: &Disk, protocol: Protocol, prepare: impl Fn(&mut Guest)) -> Guest {
    let mut wanted = Wanted::all();
    wanted.protocol |= protocol;
    let mut guest = disk.guest(Options {
        wanted,
        ..Options::default()
    });
    prepare(&mut guest);
    guest.reset_queue(0).expect("queue");
    guest.assert_reads(0, &disk.content);
    guest
}

#[test]
fn an_in_flight_area_cut_short_under_a_running_queue() {
    let mut disk = Disk::serve();
    let area = memfd(4096);
    let mut guest = guest_with(&disk, Protocol::INFLIGHT_SHMFD, |guest| {
        let info = VhostUserInflight::new(4096, 0, 1, 128);
        let frontend = &mut guest.session.frontend;
        frontend
            .set_inflight_fd(&info, area.as_raw_fd())
            .expect("area");
    });
    area.set_len(0).expect("cut");
    let placed = guest.place(IN, 0, 4096);
    guest.queues[0].submit(&placed.chain, Layout::Direct);
    guest.queues[0].publish();
    assert_hung_up(&guest);
    disk.assert_well();
}

#[test]
fn a_log_cut_short_under_a_running_queue() {
    let mut disk = Disk::serve();
    let log = memfd(1 << 20);
    let mut guest = guest_with(&disk, Protocol::LOG_SHMFD, |guest| {
        let region = VhostUserDirtyLogRegion {
            mmap_size: 1 << 20,
            mmap_offset: 0,
            mmap_handle: log.as_raw_fd(),
        };
        let frontend = &guest.session.frontend;
        frontend.set_log_base(0, Some(region)).expect("log");
        let features = guest.session.features | feature::LOG_ALL;
        frontend.set_features(features).expect("features");
    });
    log.set_len(0).expect("cut");
    let placed = guest.place(IN, 0, 4096);
    guest.queues[0].submit(&placed.chain, Layout::Direct);
    guest.queues[0].publish();
    assert_hung_up(&guest);
    disk.assert_well();
}
