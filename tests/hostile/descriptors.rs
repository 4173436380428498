//! Descriptors of a kind that a message does not mean, too many of them, and such as block a
//! process that writes to them or closes them. None holds the daemon up or kills it: the next
//! front-end is served.
//!
//! The daemon runs in its sandbox: a system call that is not in its table would end it.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::thread;
use std::time::{Duration, Instant};

use common::PATIENCE;
use common::blk::{IN, Scratch};
use common::disk::Disk;
use common::guest::{Guest, Options};
use common::memory::Memory;
use common::queue::{Layout, Queue};
use common::raw::{NEED_REPLY, Raw, VERSION, message};
use common::session::{Session, Wanted, feature};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, OFlags, fcntl_getfl, fcntl_setfl, memfd_create};
use rustix::net::sockopt::set_socket_linger;
use rustix::process::{Resource, Rlimit, getrlimit, prlimit};
use vhost::vhost_user::message::{
    FrontendReq, VhostTransferStateDirection, VhostTransferStatePhase,
};
use vhost::vhost_user::{VhostUserFrontend, VhostUserProtocolFeatures as Protocol};

const GPU_SET_SOCKET: u32 = 33;

/// One descriptor of each kind, and what keeps it open on the other side.
struct Kinds {
    all: Vec<OwnedFd>,
    _peers: Vec<OwnedFd>,
}

impl Kinds {
    fn new() -> Self {
        let (reader, writer) = std::io::pipe().expect("pipe");
        let (unix, peer) = UnixStream::pair().expect("pair");
        let (datagram, other) = UnixDatagram::pair().expect("pair");
        let listener = TcpListener::bind("127.0.0.1:0").expect("listener");
        let tcp = TcpStream::connect(listener.local_addr().expect("address")).expect("TCP");
        let all = vec![
            reader.into(),
            unix.into(),
            tcp.into(),
            memfd_create("memory", MemfdFlags::CLOEXEC).expect("memfd"),
            eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd"),
            File::open("/").expect("directory").into(),
            File::open("/dev/null").expect("device").into(),
            datagram.into(),
        ];
        Self {
            all,
            _peers: vec![writer.into(), peer.into(), other.into(), listener.into()],
        }
    }
}

/// A connection that negotiated replies.
fn connect(disk: &Disk) -> Raw {
    let mut raw = Raw::new(disk.daemon.connect());
    raw.ask(FrontendReq::GET_FEATURES, 0, &[])
        .expect("features");
    raw
}

/// Every request with every kind of descriptor, alone and in pairs, and bodies of the lengths that
/// requests have.
#[test]
fn every_request_with_every_kind_of_descriptor() {
    let mut disk = Disk::serve();
    let kinds = Kinds::new();
    for request in 0..=60 {
        for len in [0, 8, 12, 16, 24, 40] {
            for file in [None].into_iter().chain(kinds.all.iter().map(Some)) {
                for count in [1, 2] {
                    let fds: Vec<_> = file.iter().map(|file| file.as_raw_fd()).collect();
                    let raw = connect(&disk);
                    let bytes = message(request, VERSION | NEED_REPLY, len, &vec![0; len as usize]);
                    raw.send_bytes(&bytes, &fds.repeat(count));
                    if file.is_none() {
                        break;
                    }
                }
            }
        }
        disk.daemon.assert_alive();
    }
    disk.assert_well();
}

#[test]
fn a_socket_for_a_gpu_is_refused() {
    let mut disk = Disk::serve();
    let kinds = Kinds::new();
    for file in &kinds.all {
        let mut raw = connect(&disk);
        let bytes = message(GPU_SET_SOCKET, VERSION | NEED_REPLY, 0, &[]);
        assert!(raw.send_bytes(&bytes, &[file.as_raw_fd()]));
        assert_ne!(raw.receive().expect("answer").number(), 0);
    }
    disk.assert_well();
}

/// The kernel drops the descriptors past the room for them, and the header must not wait for ever.
#[test]
fn more_descriptors_than_a_message_may_have() {
    let mut disk = Disk::serve();
    let file = memfd_create("memory", MemfdFlags::CLOEXEC).expect("memfd");
    for count in [33, 34, 64, 253] {
        for request in [1, 5, 12, 37] {
            let mut raw = connect(&disk);
            let bytes = message(request, VERSION | NEED_REPLY, 8, &[0; 8]);
            if raw.send_bytes(&bytes, &vec![file.as_raw_fd(); count]) {
                raw.assert_closed();
            }
        }
    }
    disk.assert_well();
    assert!(
        disk.daemon
            .log()
            .contains("descriptors of a message were lost")
    );
}

#[test]
fn no_descriptor_left_for_one_that_a_message_has() {
    let mut disk = Disk::serve();
    let mut raw = connect(&disk);
    let maximum = getrlimit(Resource::Nofile).maximum;
    let limit = |current| {
        let limit = Rlimit { current, maximum };
        prlimit(Some(disk.daemon.pid()), Resource::Nofile, limit).expect("prlimit");
    };
    // The standard streams are open.
    limit(Some(3));
    let event = eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd");
    let queue = 0u64.to_le_bytes();
    assert!(raw.send(
        FrontendReq::SET_VRING_KICK,
        NEED_REPLY,
        &queue,
        &[event.as_raw_fd()]
    ));
    raw.assert_closed();
    limit(maximum);
    disk.assert_well();
}

/// A shortage when a queue starts is answered, and reported on the queue's error descriptor.
#[test]
fn no_descriptor_left_for_the_worker_of_a_queue() {
    let mut disk = Disk::serve();
    let (mut session, memory) = disk.session();
    let queue = Queue::new(&memory, 128, session.has(feature::EVENT_IDX));
    let vring = queue.ring.vring.clone();
    session.set_up_queue(0, &vring, 0).expect("set up");
    let maximum = getrlimit(Resource::Nofile).maximum;
    let limit = |current| {
        let limit = Rlimit { current, maximum };
        prlimit(Some(disk.daemon.pid()), Resource::Nofile, limit).expect("prlimit");
    };
    // The standard streams are open.
    limit(Some(3));
    assert!(session.enable(0, true).is_err(), "a queue without a worker");
    assert_eq!(vring.err.read().expect("error"), 1);
    limit(maximum);
    session.enable(0, false).expect("disable");
    session.enable(0, true).expect("enable");
    let mut guest = Guest {
        queues: vec![queue],
        scratch: Scratch::new(&memory, 512 << 10),
        session,
        memory,
    };
    guest.assert_reads(0, &disk.content);
    drop(guest);
    disk.assert_well();
}

/// An eventfd on which a write waits: its counter is at its limit, and O_NONBLOCK is not set, or
/// is taken back, for the flags are the front-end's as much as the daemon's.
fn fill(event: &impl AsFd) {
    fcntl_setfl(event, OFlags::NONBLOCK).expect("flags");
    let limit = (u64::MAX - 1).to_le_bytes();
    match rustix::io::write(event, &limit) {
        Ok(_) | Err(rustix::io::Errno::AGAIN) => {}
        Err(error) => panic!("eventfd: {error}"),
    }
    let flags = fcntl_getfl(event).expect("flags");
    fcntl_setfl(event, flags - OFlags::NONBLOCK).expect("flags");
}

/// The next front-end is served, and SIGTERM ends the daemon in good order.
fn assert_not_held_up(mut disk: Disk) {
    disk.assert_well();
    let status = disk.daemon.terminate();
    assert_eq!(status.code(), Some(0), "{}", disk.daemon.log());
}

/// Sends an eventfd for queue 0, and waits until it is taken.
fn send_eventfd(raw: &mut Raw, request: FrontendReq, event: &OwnedFd) {
    let fds = [event.as_raw_fd()];
    assert!(raw.send(request, NEED_REPLY, &0u64.to_le_bytes(), &fds));
    assert_eq!(raw.receive().expect("answer").number(), 0);
}

#[test]
fn a_call_that_blocks_holds_no_other_front_end_up() {
    let disk = Disk::serve();
    let stream = disk.daemon.connect();
    let mut raw = Raw::new(stream.try_clone().expect("socket"));
    let mut guest = Guest::boot(stream, Options::default()).expect("guest");
    guest.assert_reads(0, &disk.content);
    let call = eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd");
    fill(&call);
    // The worker that starts with it signals it, and so blocks at once.
    send_eventfd(&mut raw, FrontendReq::SET_VRING_CALL, &call);
    fill(&call);
    thread::sleep(Duration::from_millis(50));
    // To stop the queue ends the write.
    guest.session.stop_queue(0).expect("stop");
    guest.start_queue(0).expect("start");
    send_eventfd(&mut raw, FrontendReq::SET_VRING_CALL, &call);
    fill(&call);
    let placed = guest.place(IN, 0, 4096);
    guest.queues[0].submit(&placed.chain, Layout::Direct);
    guest.queues[0].publish();
    assert_not_held_up(disk);
}

#[test]
fn a_call_that_blocks_does_not_delay_the_end() {
    let mut disk = Disk::serve();
    let stream = disk.daemon.connect();
    let mut raw = Raw::new(stream.try_clone().expect("socket"));
    let _guest = Guest::boot(stream, Options::default()).expect("guest");
    let call = eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd");
    fill(&call);
    send_eventfd(&mut raw, FrontendReq::SET_VRING_CALL, &call);
    fill(&call);
    thread::sleep(Duration::from_millis(50));
    let status = disk.daemon.terminate();
    assert_eq!(status.code(), Some(0), "{}", disk.daemon.log());
}

#[test]
fn an_error_descriptor_that_blocks_holds_no_other_front_end_up() {
    let disk = Disk::serve();
    let stream = disk.daemon.connect();
    let mut raw = Raw::new(stream.try_clone().expect("socket"));
    let session = Session::negotiate(stream, Wanted::all()).expect("session");
    let memory = Memory::typical();
    let queue = Queue::new(&memory, 128, session.has(feature::EVENT_IDX));
    let vring = &queue.ring.vring;
    session.set_up_queue(0, vring, 0).expect("set up");
    let error = eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd");
    send_eventfd(&mut raw, FrontendReq::SET_VRING_ERR, &error);
    fill(&error);
    // There is no memory for the queue: that is reported.
    let enable = [0u32, 1].map(u32::to_le_bytes);
    assert!(raw.send(FrontendReq::SET_VRING_ENABLE, 0, enable.as_flattened(), &[]));
    thread::sleep(Duration::from_millis(50));
    assert_not_held_up(disk);
}

/// Descriptors that are refused where an eventfd is meant.
#[test]
fn kicks_calls_and_errors_that_are_no_eventfds() {
    let mut disk = Disk::serve();
    let kinds = Kinds::new();
    for request in [
        FrontendReq::SET_VRING_KICK,
        FrontendReq::SET_VRING_CALL,
        FrontendReq::SET_VRING_ERR,
    ] {
        for (index, file) in kinds.all.iter().enumerate() {
            let mut raw = connect(&disk);
            let body = 0u64.to_le_bytes();
            assert!(raw.send(request, NEED_REPLY, &body, &[file.as_raw_fd()]));
            let refused = raw.receive().expect("answer").number() != 0;
            assert_eq!(refused, index != 4, "{request:?} with descriptor {index}");
        }
    }
    disk.assert_well();
}

/// A TCP socket whose peer reads nothing, and whose close waits for that.
fn lingering() -> (TcpStream, TcpListener) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("listener");
    let mut socket = TcpStream::connect(listener.local_addr().expect("address")).expect("TCP");
    let linger = Some(Duration::from_secs(3600));
    set_socket_linger(&socket, linger).expect("linger");
    socket.set_nonblocking(true).expect("socket");
    loop {
        match socket.write(&[0; 1 << 16]) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => panic!("TCP: {error}"),
        }
    }
    socket.set_nonblocking(false).expect("socket");
    (socket, listener)
}

#[test]
fn a_socket_that_lingers_holds_no_other_front_end_up() {
    let disk = Disk::serve();
    let mut listeners = Vec::new();
    for request in [1, 5, 12, 13, 32, GPU_SET_SOCKET, 37, 42, 99] {
        let (socket, listener) = lingering();
        let raw = connect(&disk);
        let bytes = message(request, VERSION, 8, &[0; 8]);
        raw.send_bytes(&bytes[..4], &[socket.as_raw_fd()]);
        // The daemon closes it last, for it has no whole message yet.
        drop(socket);
        raw.send_bytes(&bytes[4..], &[]);
        listeners.push(listener);
    }
    assert_not_held_up(disk);
}

/// So does one among descriptors that are too many, which the kernel closes within the call.
#[test]
fn a_socket_that_lingers_is_among_too_many() {
    let disk = Disk::serve();
    let (socket, _listener) = lingering();
    let raw = connect(&disk);
    let event = eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd");
    let mut fds = vec![event.as_raw_fd(); 40];
    fds[39] = socket.as_raw_fd();
    raw.send_bytes(&message(5, VERSION, 8, &[0; 8]), &fds);
    // Closed on a thread of its own, should it be closed last here.
    thread::spawn(move || drop(socket));
    assert_not_held_up(disk);
}

/// The write end stays open, and the pipe's O_NONBLOCK is the front-end's to take back.
#[test]
fn a_device_state_that_does_not_end_is_not_waited_for() {
    let disk = Disk::serve();
    let mut wanted = Wanted::all();
    wanted.protocol |= Protocol::DEVICE_STATE;
    let session = Session::negotiate(disk.daemon.connect(), wanted).expect("session");
    let (reader, _writer) = std::io::pipe().expect("pipe");
    let theirs = reader.try_clone().expect("pipe");
    let load = VhostTransferStateDirection::LOAD;
    let stopped = VhostTransferStatePhase::STOPPED;
    let sent = session
        .frontend
        .set_device_state_fd(load, stopped, theirs.into());
    sent.expect("load");
    let done = thread::spawn(move || session.frontend.check_device_state());
    let start = Instant::now();
    while !done.is_finished() {
        let flags = fcntl_getfl(&reader).expect("flags");
        fcntl_setfl(&reader, flags - OFlags::NONBLOCK).expect("flags");
        assert!(start.elapsed() < PATIENCE, "the daemon waits for the pipe");
    }
    done.join().expect("thread").expect("an empty state");
    assert_not_held_up(disk);
}
