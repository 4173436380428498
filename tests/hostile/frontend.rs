//! A front-end that breaks the vhost-user protocol loses its connection, no more: the next one is
//! served.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::thread;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{FrontendReq, VhostUserInflight};
use vhost::vhost_user::{VhostUserFrontend, VhostUserProtocolFeatures as Protocol};
use vhost::{VhostBackend, VhostUserDirtyLogRegion};

use common::PATIENCE;
use common::blk::{DISCARD, IN, OK, Scratch, WRITE_ZEROES, range};
use common::disk::Disk;
use common::guest::{Guest, Options};
use common::memory::{Memory, Region};
use common::queue::{Layout, Queue, signalled};
use common::raw::{NEED_REPLY, REPLY, Raw, VERSION, message};
use common::session::{Session, Wanted, feature};
use tempfile::TempDir;

fn connect(disk: &Disk) -> Raw {
    Raw::new(disk.daemon.connect())
}

/// A connection that negotiated what most messages need, REPLY_ACK among it.
fn negotiated(disk: &Disk) -> Raw {
    let mut raw = connect(disk);
    let features = feature::VERSION_1 | feature::PROTOCOL;
    let protocol = Protocol::REPLY_ACK
        | Protocol::CONFIG
        | Protocol::MQ
        | Protocol::INFLIGHT_SHMFD
        | Protocol::CONFIGURE_MEM_SLOTS
        | Protocol::LOG_SHMFD;
    raw.ask(FrontendReq::GET_FEATURES, 0, &[])
        .expect("features");
    raw.ask(FrontendReq::GET_PROTOCOL_FEATURES, 0, &[])
        .expect("protocol features");
    let protocol = protocol.bits().to_le_bytes();
    assert!(raw.send(FrontendReq::SET_PROTOCOL_FEATURES, 0, &protocol, &[]));
    raw.ask(
        FrontendReq::SET_FEATURES,
        NEED_REPLY,
        &features.to_le_bytes(),
    )
    .expect("ack");
    raw
}

/// The message must be refused: by an answer that says so, or by hanging up. The configuration space
/// is refused by an answer of no bytes of it, everything else by an acknowledgement that is not 0.
fn assert_refused(disk: &mut Disk, request: FrontendReq, body: &[u8], fds: &[i32]) {
    let mut raw = negotiated(disk);
    let sent = raw.send(request, NEED_REPLY, body, fds);
    if sent && let Some(answer) = raw.receive() {
        let refused = match request {
            FrontendReq::GET_CONFIG => answer.body.get(4..8) == Some(&[0; 4]),
            _ => answer.number() != 0,
        };
        assert!(refused, "{request:?} with {body:02x?}: {answer:02x?}");
    }
    drop(raw);
    disk.assert_well();
}

/// A payload of 32-bit numbers.
fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A payload of 64-bit numbers.
fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_le_bytes()).collect()
}

#[test]
fn half_a_header_and_half_a_message() {
    let mut disk = Disk::serve();
    let whole = message(2, VERSION, 8, &[0; 8]);
    for len in 1..whole.len() {
        let raw = connect(&disk);
        assert!(raw.send_bytes(&whole[..len], &[]));
        drop(raw);
    }
    disk.assert_well();
}

#[test]
fn headers_that_make_no_sense() {
    let mut disk = Disk::serve();
    for (request, flags, len) in [
        (0, VERSION, 0),
        (45, VERSION, 0),
        (1000, VERSION, 0),
        (u32::MAX, VERSION, 0),
        // No version, a later one, an answer, reserved flags.
        (1, 0, 0),
        (1, 2, 0),
        (1, VERSION | REPLY, 0),
        (1, VERSION | 0xffff_fff0, 0),
        // Payloads too long, and a wrong length for the message.
        (2, VERSION, u32::MAX),
        (2, VERSION, 0x1001),
        (2, VERSION, 0x1000_0000),
    ] {
        let mut raw = connect(&disk);
        let sent = raw.send_bytes(&message(request, flags, len, &[]), &[]);
        if sent {
            raw.assert_closed();
        }
        disk.assert_well();
    }
}

#[test]
fn payloads_of_the_wrong_length() {
    let mut disk = Disk::serve();
    for request in [
        FrontendReq::SET_FEATURES,
        FrontendReq::SET_PROTOCOL_FEATURES,
        FrontendReq::SET_MEM_TABLE,
        FrontendReq::SET_VRING_NUM,
        FrontendReq::SET_VRING_ADDR,
        FrontendReq::SET_VRING_KICK,
        FrontendReq::GET_CONFIG,
        FrontendReq::SET_INFLIGHT_FD,
        FrontendReq::ADD_MEM_REG,
    ] {
        for len in [1, 7, 13, 4096] {
            assert_refused(&mut disk, request, &vec![0; len], &[]);
        }
    }
}

#[test]
fn queues_that_are_none() {
    let mut disk = Disk::serve();
    for index in [0x100, 0xffff, u32::MAX] {
        for request in [
            FrontendReq::SET_VRING_NUM,
            FrontendReq::SET_VRING_BASE,
            FrontendReq::SET_VRING_ENABLE,
        ] {
            assert_refused(&mut disk, request, &words(&[index, 1]), &[]);
        }
    }
}

#[test]
fn queue_sizes_that_are_none() {
    let mut disk = Disk::serve();
    for size in [0, 3, 100, 0x8001, 0x1_0000, u32::MAX] {
        assert_refused(
            &mut disk,
            FrontendReq::SET_VRING_NUM,
            &words(&[0, size]),
            &[],
        );
    }
}

#[test]
fn file_descriptors_where_none_belong_and_none_where_some_do() {
    let mut disk = Disk::serve();
    let file = File::open("/dev/null").expect("/dev/null");
    let fd = file.as_raw_fd();
    let region = longs(&[0, 0x1000_0000, 0x1000, 0x7000_0000, 0]);
    let table = [&words(&[1, 0])[..], &region[8..]].concat();
    assert_refused(&mut disk, FrontendReq::SET_FEATURES, &longs(&[0]), &[fd]);
    assert_refused(&mut disk, FrontendReq::SET_MEM_TABLE, &table, &[]);
    assert_refused(&mut disk, FrontendReq::SET_MEM_TABLE, &table, &[fd, fd]);
    assert_refused(&mut disk, FrontendReq::ADD_MEM_REG, &region, &[]);
    assert_refused(&mut disk, FrontendReq::ADD_MEM_REG, &region, &[fd, fd]);
    assert_refused(&mut disk, FrontendReq::SET_VRING_KICK, &longs(&[0]), &[]);
    assert_refused(
        &mut disk,
        FrontendReq::SET_VRING_KICK,
        &longs(&[0]),
        &[fd, fd],
    );
    // Descriptors that are no memory.
    assert_refused(&mut disk, FrontendReq::SET_MEM_TABLE, &table, &[fd]);
    assert_refused(&mut disk, FrontendReq::ADD_MEM_REG, &region, &[fd]);
    let inflight = [&longs(&[0x1000, 0])[..], &[1, 0, 128, 0, 0, 0, 0, 0]].concat();
    assert_refused(&mut disk, FrontendReq::SET_INFLIGHT_FD, &inflight, &[fd]);
}

#[test]
fn memory_that_is_absurd() {
    let mut disk = Disk::serve();
    let region = Region::new(0x1000_0000, 1 << 20, 0);
    let fd = region.file().as_raw_fd();
    for (guest, size, user, offset) in [
        // Empty, beyond the end of the file, and overflowing.
        (0x1000_0000, 0, 0x7000_0000, 0),
        (0x1000_0000, 2 << 20, 0x7000_0000, 0),
        (0x1000_0000, 1 << 20, 0x7000_0000, 1 << 20),
        (0x1000_0000, 1 << 62, 0x7000_0000, 0),
        (u64::MAX - 0xfff, 1 << 20, 0x7000_0000, 0),
        (0x1000_0000, 1 << 20, u64::MAX - 0xfff, 0),
        (0x1000_0000, 1 << 20, 0x7000_0000, u64::MAX - 0xfff),
    ] {
        let entry = longs(&[guest, size, user, offset]);
        let table = [&words(&[1, 0])[..], &entry].concat();
        assert_refused(&mut disk, FrontendReq::SET_MEM_TABLE, &table, &[fd]);
        let single = [&longs(&[0])[..], &entry].concat();
        assert_refused(&mut disk, FrontendReq::ADD_MEM_REG, &single, &[fd]);
    }
    // Two regions that overlap.
    let entry = longs(&[0x1000_0000, 1 << 20, 0x7000_0000, 0]);
    let over = longs(&[0x1008_0000, 1 << 20, 0x8000_0000, 0]);
    let table = [&words(&[2, 0])[..], &entry, &over].concat();
    assert_refused(&mut disk, FrontendReq::SET_MEM_TABLE, &table, &[fd, fd]);
}

#[test]
fn a_config_space_that_is_asked_for_beyond_its_end() {
    let mut disk = Disk::serve();
    for (offset, len) in [
        // Behind the 256 bytes there are, and behind the same at the offset of virtio-mmio.
        (0xf0, 0x20),
        (0x1f0, 0x20),
        (0xff, 2),
        (0x300, 1),
        // What no message may ask for.
        (0xff0, 0x20),
        (u32::MAX, 1),
        (0, 0),
    ] {
        let body = [&words(&[offset, len, 0])[..], &vec![0; len as usize]].concat();
        assert_refused(&mut disk, FrontendReq::GET_CONFIG, &body, &[]);
    }
}

/// Such a queue says so on its error descriptor, and runs once there is memory.
#[test]
fn queues_started_before_there_is_memory() {
    let disk = Disk::serve();
    let mut session = Session::negotiate(disk.daemon.connect(), Wanted::all()).expect("session");
    let memory = Memory::typical();
    let queue = Queue::new(&memory, 128, session.has(feature::EVENT_IDX));
    let vring = queue.ring.vring.clone();
    session.start_queue(0, &vring, 0).expect("set up");
    vring.kick.write(1).expect("kick");
    assert!(signalled(&[&vring.err]), "the queue cannot run");
    assert_eq!(vring.err.read().expect("error"), 1, "said once");
    session.share(&memory).expect("memory");
    let mut guest = Guest {
        queues: vec![queue],
        scratch: Scratch::new(&memory, 512 << 10),
        session,
        memory,
    };
    guest.assert_reads(0, &disk.content);
}

/// Nobody can wait for it: the queue says so, and goes on once it has another.
#[test]
fn a_kick_that_is_no_eventfd() {
    let disk = Disk::serve();
    let stream = disk.daemon.connect();
    let mut raw = Raw::new(stream.try_clone().expect("socket"));
    let mut guest = Guest::boot(stream, Options::default()).expect("guest");
    guest.assert_reads(0, &disk.content);
    let null = File::open("/dev/null").expect("/dev/null");
    let (request, queue) = (FrontendReq::SET_VRING_KICK, longs(&[0]));
    assert!(raw.send(request, NEED_REPLY, &queue, &[null.as_raw_fd()]));
    assert_eq!(raw.receive().expect("answer").number(), 0);
    let err = &guest.queues[0].ring.vring.err;
    assert!(signalled(&[err]), "the queue cannot run");
    assert_eq!(err.read().expect("error"), 1, "said once");
    guest.reset_queue(0).expect("reset");
    guest.assert_reads(0, &disk.content);
}

#[test]
fn a_polling_front_end_gives_no_call_descriptor() {
    // Bit 8 of the payload: no descriptor, the driver polls.
    let mut disk = Disk::serve();
    let mut raw = negotiated(&disk);
    for request in [FrontendReq::SET_VRING_CALL, FrontendReq::SET_VRING_ERR] {
        let answer = raw
            .ask(request, NEED_REPLY, &longs(&[0x100]))
            .expect("answer");
        assert_eq!(
            answer.number(),
            0,
            "{request:?} without a descriptor is lawful"
        );
    }
    drop(raw);
    disk.assert_well();
}

#[test]
fn noise() {
    let mut disk = Disk::serve();
    let mut random = common::content::Random::new(77);
    for _ in 0..300 {
        let raw = connect(&disk);
        let bytes: Vec<u8> = (0..random.within(1..=200))
            .map(|_| random.any() as u8)
            .collect();
        raw.send_bytes(&bytes, &[]);
        // The same with a header that is almost right.
        let raw = connect(&disk);
        let len = random.below(64) as u32;
        let body: Vec<u8> = (0..len).map(|_| random.any() as u8).collect();
        let request = random.within(1..=44) as u32;
        raw.send_bytes(&message(request, VERSION | NEED_REPLY, len, &body), &[]);
    }
    disk.assert_well();
}

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

/// Lines of the daemon's log about connections it dropped.
fn dropped(disk: &Disk) -> usize {
    disk.daemon.log().matches("connection is dropped").count()
}

/// Lines of the daemon's log about front-ends, and how many they say were left out.
fn complaints(disk: &Disk) -> (u64, u64) {
    let log = disk.daemon.log();
    let lines = log.lines().filter(|line| line.contains(" WARN "));
    lines.fold((0, 0), |(lines, left_out), line| {
        let note = line.strip_suffix(" lines left out before it)");
        let number = note.and_then(|note| note.rsplit_once('(')?.1.parse().ok());
        (lines + 1, left_out + number.unwrap_or(0))
    })
}

fn a_bad_connection_is_logged(mut disk: Disk) {
    const MANY: u64 = 2000;
    /// What the log takes at once; after that it takes one line a second.
    const BURST: u64 = 32;
    let bad = message(1000, VERSION, 0, &[]);
    let break_rules = |disk: &Disk| {
        let mut raw = connect(disk);
        if raw.send_bytes(&bad, &[]) {
            raw.assert_closed();
        }
    };
    let start = Instant::now();
    break_rules(&disk);
    disk.assert_well();
    assert_eq!(dropped(&disk), 1, "{}", disk.daemon.log());
    for _ in 1..MANY {
        break_rules(&disk);
    }
    disk.assert_well();
    let most = BURST + start.elapsed().as_secs() + 1;
    let (lines, left_out) = complaints(&disk);
    assert!(
        (BURST..=most).contains(&lines),
        "{lines} lines, {most} at most"
    );
    // The next line there is room for counts all that were left out.
    let mut connections = MANY;
    while complaints(&disk).1 == left_out {
        assert!(start.elapsed() < 2 * PATIENCE, "no line any more");
        thread::sleep(Duration::from_millis(100));
        break_rules(&disk);
        disk.assert_well();
        connections += 1;
    }
    let (lines, left_out) = complaints(&disk);
    let said = lines + left_out;
    // A connection may also have replaced the one before.
    assert!(
        (connections..=2 * connections).contains(&said),
        "{lines} lines and {left_out} left out of {connections} connections"
    );
}

#[test]
fn a_bad_connection_is_logged_once_and_many_do_not_flood_the_log() {
    a_bad_connection_is_logged(Disk::serve());
}

#[test]
fn a_bad_connection_to_a_writable_device_is_logged_once() {
    let folder = tempfile::tempdir().expect("temporary directory");
    a_bad_connection_is_logged(writable(&folder));
}

/// The same disk, with a writable layer in `folder`.
fn writable(folder: &TempDir) -> Disk {
    let path = folder.path().to_str().expect("UTF-8");
    Disk::serve_with(&["--upper-auto", path])
}

fn connections_leave_nothing_behind(mut disk: Disk, mut use_it: impl FnMut(&mut Guest)) {
    let mut use_once = |disk: &Disk| {
        let mut guest = disk.guest(Options::default());
        guest.assert_reads(0, &disk.content);
        use_it(&mut guest);
    };
    use_once(&disk);
    disk.assert_well();
    let count = |disk: &Disk| (disk.daemon.count("fd"), disk.daemon.count("task"));
    let before = settled(&disk, count);
    let mut memory = 0;
    for round in 0..10_000 {
        if round == 1000 {
            memory = disk.daemon.private_kib();
        }
        let raw = connect(&disk);
        match round % 100 {
            0 => drop(negotiated(&disk)),
            1 => use_once(&disk),
            2..50 => {
                raw.send(FrontendReq::GET_FEATURES, 0, &[], &[]);
            }
            _ => {}
        }
    }
    disk.assert_well();
    assert_eq!(settled(&disk, count), before, "descriptors and threads");
    // A hundred bytes of each connection would be 900 KiB.
    let grown = disk.daemon.private_kib().saturating_sub(memory);
    assert!(grown < 512, "private memory grew by {grown} KiB");
}

#[test]
fn thousands_of_connections_leave_nothing_behind() {
    connections_leave_nothing_behind(Disk::serve(), |_| {});
}

#[test]
fn thousands_of_connections_to_a_writable_device_leave_nothing_behind() {
    let folder = tempfile::tempdir().expect("temporary directory");
    let disk = writable(&folder);
    // Where the tests read, what is there already; elsewhere anything.
    let same = disk.expected(0, 4096).to_vec();
    connections_leave_nothing_behind(disk, |guest| {
        guest.write(0, 0, &same);
        guest.write(0, 999, &same);
        for (kind, sector) in [(DISCARD, 1001), (WRITE_ZEROES, 1003)] {
            assert_eq!(guest.send(0, kind, 0, &range(sector, 2, 0)), OK);
        }
        guest.flush(0);
    });
}

/// The counts once they no longer change: connections end after their peer did.
fn settled(disk: &Disk, count: impl Fn(&Disk) -> (usize, usize)) -> (usize, usize) {
    let (mut last, mut same) = (count(disk), 0);
    let start = Instant::now();
    while same < 20 {
        assert!(start.elapsed() < PATIENCE, "still changing: {last:?}");
        thread::sleep(Duration::from_millis(10));
        let now = count(disk);
        same = if now == last { same + 1 } else { 0 };
        last = now;
    }
    last
}
