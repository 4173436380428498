//! What a front-end needs to move a running machine: a log of the pages we write, and a device
//! state, which is empty.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use common::blk::{DISCARD, FLUSH, GET_ID, IN, IOERR, OK, OUT, UNMAP, WRITE_ZEROES, range};
use common::content::tagged;
use common::disk::Disk;
use common::guest::{Guest, Options};
use common::memory::Memory;
use common::queue::Layout;
use common::session::{Wanted, addresses, feature};
use common::writable::Writable;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags,
    VhostUserProtocolFeatures as Protocol,
};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VringConfigData};

const PAGE: u64 = 4096;

/// A log area for all of `Memory::typical`, and how many bytes before it in its file are not ours.
struct Log {
    file: File,
    len: u64,
}

const BEFORE: u64 = 4096;

impl Log {
    fn new(memory: &Memory) -> Self {
        let end = memory
            .regions
            .iter()
            .map(|region| region.end())
            .max()
            .expect("regions");
        let len = (end / PAGE).div_ceil(8).next_multiple_of(PAGE);
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let file = File::from(rustix::fs::memfd_create("log", flags).expect("memfd"));
        file.set_len(BEFORE + len).expect("length");
        Self { file, len }
    }

    fn region(&self) -> VhostUserDirtyLogRegion {
        VhostUserDirtyLogRegion {
            mmap_size: self.len,
            mmap_offset: BEFORE,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    /// The pages marked since the last call.
    fn take(&self) -> BTreeSet<u64> {
        let mut bits = vec![0; (BEFORE + self.len) as usize];
        self.file.read_exact_at(&mut bits, 0).expect("log");
        assert!(
            bits[..BEFORE as usize].iter().all(|byte| *byte == 0),
            "before the log"
        );
        self.file
            .write_all_at(&vec![0; self.len as usize], BEFORE)
            .expect("log");
        let bits = &bits[BEFORE as usize..];
        let marked =
            (0..self.len * 8).filter(|page| bits[(page / 8) as usize] >> (page % 8) & 1 == 1);
        marked.collect()
    }
}

/// All pages of the guest.
fn pages(memory: &Memory) -> Vec<(u64, Vec<u8>)> {
    let regions = memory.regions.iter();
    let all = regions.flat_map(|region| (region.base()..region.end()).step_by(PAGE as usize));
    all.map(|address| (address / PAGE, memory.read(address, PAGE as usize)))
        .collect()
}

fn changed(before: &[(u64, Vec<u8>)], memory: &Memory) -> BTreeSet<u64> {
    let after = pages(memory);
    let pairs = before.iter().zip(&after);
    pairs
        .filter(|(old, new)| old.1 != new.1)
        .map(|(old, _)| old.0)
        .collect()
}

/// Guest address of the used ring of queue 0.
fn used_ring(guest: &Guest) -> u64 {
    let user = guest.queues[0].ring.vring.at.used;
    let mut regions = guest.memory.regions.iter();
    let offset = |region: &std::sync::Arc<common::memory::Region>| {
        let offset = user.checked_sub(region.user_address(region.base()))?;
        (offset < region.size()).then(|| region.base() + offset)
    };
    regions
        .find_map(offset)
        .expect("the used ring is in memory")
}

/// Turns logging on or off the way QEMU does: features, then the address of each ring.
fn set_logging(guest: &Guest, on: bool) {
    let bit = if on { feature::LOG_ALL } else { 0 };
    guest
        .session
        .frontend
        .set_features(guest.session.features | bit)
        .expect("features");
    let ring = &guest.queues[0].ring;
    let used = used_ring(guest);
    let data = VringConfigData {
        flags: u32::from(on),
        log_addr: on.then_some(used),
        ..addresses(&ring.vring)
    };
    guest
        .session
        .frontend
        .set_vring_addr(0, &data)
        .expect("ring addresses");
}

fn wanted() -> Options {
    let mut wanted = Wanted::all();
    wanted.protocol |= Protocol::LOG_SHMFD | Protocol::DEVICE_STATE;
    Options {
        wanted,
        ..Options::default()
    }
}

/// A request: kind, sector, and its data, of which a read fills as much.
type Request = (u32, u64, Vec<u8>);

/// Runs `requests` with the log on; returns the pages that the device may have written, the pages
/// of data that it only read, and the pages it marked. `before` is the log used until now.
fn run_logged(
    guest: &mut Guest,
    log: &Log,
    before: &Log,
    requests: &[Request],
) -> [BTreeSet<u64>; 3] {
    let region = Some(log.region());
    guest.session.frontend.set_log_base(0, region).expect("log");
    set_logging(guest, true);
    log.take();
    // A worker that went to sleep after its last answer wrote its event index.
    before.take();
    let (mut written, mut read) = (BTreeSet::new(), BTreeSet::new());
    let before = pages(&guest.memory);
    for (kind, sector, data) in requests {
        let placed = guest.place_data(*kind, *sector, data);
        let answer = guest.run(0, &placed, Layout::Indirect);
        assert_eq!(answer.status, OK, "type {kind} at sector {sector}");
        for part in placed.chain.iter().filter(|part| part.len > 0) {
            let last = part.address + u64::from(part.len) - 1;
            let pages = part.address / PAGE..=last / PAGE;
            match part.write {
                true => written.extend(pages),
                false => read.extend(pages),
            }
        }
    }
    let ring = used_ring(guest);
    let len = 6 + 8 * u64::from(guest.queues[0].ring.size());
    written.extend(ring / PAGE..=(ring + len - 1) / PAGE);
    let marked = log.take();
    // What the driver wrote itself changed as well, but not these pages of ours.
    let changed = changed(&before, &guest.memory);
    let ours: BTreeSet<_> = changed.intersection(&written).copied().collect();
    assert!(!ours.is_empty());
    let missing = &ours - &marked;
    assert!(missing.is_empty(), "changed and not marked: {missing:?}");
    [written, read, marked]
}

#[test]
fn every_page_written_is_logged_and_no_other() {
    let disk = Disk::serve();
    let mut guest = disk.guest(wanted());
    let logs = [Log::new(&guest.memory), Log::new(&guest.memory)];
    let reads = [(0, 512), (9, 65536), (70_001, 4096 + 512), (100, 131_072)];
    let requests = reads.map(|(sector, len)| (IN, sector, vec![0; len]));
    for _ in 0..2 {
        for (round, log) in logs.iter().enumerate() {
            let [written, _, marked] = run_logged(&mut guest, log, &logs[1 - round], &requests);
            assert!(
                marked.is_subset(&written),
                "round {round}: {:?}",
                &marked - &written
            );
            // The other log is not written to any more.
            assert!(logs[1 - round].take().is_empty());
        }
        set_logging(&guest, false);
        logs[1].take();
        guest.assert_reads(0, &disk.content);
        assert!(
            logs.iter().all(|log| log.take().is_empty()),
            "logging is off"
        );
    }
}

/// Of requests that write to the disk nothing changes in memory but the answers.
#[test]
fn what_the_disk_is_written_from_is_not_logged() {
    let disk = Writable::serve();
    let mut guest = disk.guest(wanted());
    let log = Log::new(&guest.memory);
    let requests: [Request; 8] = [
        (OUT, 5, tagged(512, 1)),
        (OUT, 70_001, tagged(131_072, 2)),
        (FLUSH, 0, vec![]),
        (DISCARD, 0, range(5, 1, 0)),
        (WRITE_ZEROES, 0, range(70_000, 9, UNMAP)),
        (WRITE_ZEROES, 0, range(70_020, 9, 0)),
        (GET_ID, 0, vec![0; 20]),
        (FLUSH, 0, vec![]),
    ];
    // One by one, so that each must mark its own answer; then all with durable writes.
    for writeback in [1, 0] {
        let flags = VhostUserConfigFlags::WRITABLE;
        let frontend = &mut guest.session.frontend;
        frontend
            .set_config(32, flags, &[writeback])
            .expect("writeback");
        for request in &requests {
            let one = std::slice::from_ref(request);
            let [written, read, marked] = run_logged(&mut guest, &log, &log, one);
            assert!(read.is_disjoint(&written), "the test tells them apart");
            assert_eq!(marked, written, "type {}", request.0);
        }
    }
    guest.session.stop_queue(0).expect("stop");
    assert!(log.take().is_empty(), "nothing was left to mark");
}

/// The status of a chain that cannot be served is written, and so is its page.
#[test]
fn the_error_of_a_bad_chain_is_logged() {
    let disk = Disk::serve();
    let mut guest = disk.guest(wanted());
    let log = Log::new(&guest.memory);
    let region = Some(log.region());
    guest.session.frontend.set_log_base(0, region).expect("log");
    set_logging(&guest, true);
    log.take();
    let mut placed = guest.place(IN, 0, 512);
    placed.chain[1].address = Memory::HOLE;
    guest.queues[0].submit(&placed.chain, Layout::Direct);
    guest.queues[0].publish();
    guest.queues[0].wait();
    assert_eq!(guest.memory.read(placed.status, 1), [IOERR]);
    let marked = log.take();
    assert!(marked.contains(&(placed.status / PAGE)), "{marked:?}");
}

#[test]
fn the_device_state_is_empty() {
    let disk = Disk::serve();
    let guest = disk.guest(wanted());
    guest.session.stop_queue(0).expect("stop");
    let transfer = |direction, theirs: OwnedFd| {
        let frontend = &guest.session.frontend;
        frontend.set_device_state_fd(direction, VhostTransferStatePhase::STOPPED, theirs)
    };
    let pipe = || rustix::pipe::pipe().expect("pipe");

    let (read, write) = pipe();
    assert!(
        transfer(VhostTransferStateDirection::SAVE, write)
            .expect("save")
            .is_none()
    );
    let mut state = Vec::new();
    File::from(read).read_to_end(&mut state).expect("state");
    assert!(state.is_empty());
    guest.session.frontend.check_device_state().expect("saved");

    let (read, write) = pipe();
    assert!(
        transfer(VhostTransferStateDirection::LOAD, read)
            .expect("load")
            .is_none()
    );
    drop(write);
    guest.session.frontend.check_device_state().expect("loaded");

    let (read, write) = pipe();
    assert!(
        transfer(VhostTransferStateDirection::LOAD, read)
            .expect("load")
            .is_none()
    );
    File::from(write).write_all(b"not ours").expect("state");
    assert!(
        guest.session.frontend.check_device_state().is_err(),
        "the state of another device"
    );
}
