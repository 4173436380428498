//! Several front-ends at once: the one that starts a queue has the disk, and the one before is hung
//! up on; those that only look disturb no other. A front-end of another process waits for the end of the
//! one before.
#![allow(unsafe_code)] // what a child does before `execve(2)` has no safe form

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use common::PATIENCE;
use common::disk::Disk;
use common::guest::{Guest, Options};
use common::memory::Memory;
use common::queue::Queue;
use common::raw::Raw;
use common::session::{Session, Wanted, feature};
use common::writable::Writable;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, connect, socket};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{FrontendReq, VhostUserConfigFlags};

/// A front-end that did all but to start its queue, as the destination of a migration does.
fn ready(disk: &Disk) -> (Session, Memory, Queue) {
    let (session, memory) = disk.session();
    let queue = Queue::new(&memory, 128, session.has(feature::EVENT_IDX));
    session
        .set_up_queue(0, &queue.ring.vring, 0)
        .expect("set up");
    (session, memory, queue)
}

#[test]
fn a_front_end_that_starts_no_queue_leaves_the_disk_where_it_is() {
    let disk = Disk::serve();
    let mut old = disk.guest(Options::default());
    let silent = disk.daemon.connect();
    let mut speaks = Raw::new(disk.daemon.connect());
    assert!(speaks.ask(FrontendReq::GET_FEATURES, 0, &[]).is_some());
    let (mut session, _memory, _queue) = ready(&disk);
    old.assert_reads(0, &disk.content);
    // All of them are served.
    assert!(speaks.ask(FrontendReq::GET_FEATURES, 0, &[]).is_some());
    assert_eq!(session.capacity().expect("capacity"), disk.sectors());
    drop((silent, speaks, session));
    old.assert_reads(0, &disk.content);
}

#[test]
fn the_one_before_is_hung_up_on_when_a_queue_starts() {
    let disk = Disk::serve();
    let stream = disk.daemon.connect();
    let mut connection = Raw::new(stream.try_clone().expect("socket"));
    let mut old = Guest::boot(stream, Options::default()).expect("guest");
    old.assert_reads(0, &disk.content);
    let (mut session, memory, queue) = ready(&disk);
    old.assert_reads(0, &disk.content);
    session.enable(0, true).expect("enable");
    connection.assert_closed();
    let mut new = Guest {
        queues: vec![queue],
        scratch: common::blk::Scratch::new(&memory, 512 << 10),
        session,
        memory,
    };
    new.assert_reads(0, &disk.content);
    drop(old);
    new.assert_reads(0, &disk.content);
}

/// A migration with one daemon: there, back after the source was resumed on a new connection, and
/// there again. The source that was hung up on connects anew at once, as QEMU does, and must not
/// get the disk by that.
#[test]
fn the_disk_goes_to_and_fro() {
    let disk = Disk::serve();
    let mut serving = disk.guest(Options::default());
    for _ in 0..20 {
        serving.assert_reads(0, &disk.content);
        let (session, ..) = ready(&disk);
        let next = disk.guest(Options::default());
        // Back again, without a queue.
        let (returned, ..) = ready(&disk);
        serving = next;
        serving.assert_reads(0, &disk.content);
        drop((session, returned));
    }
    let log = disk.daemon.log();
    assert!(!log.contains("dropped"), "{log}");
}

/// The source stopped its queue for the migration, and starts it again where it stood.
#[test]
fn a_cancelled_migration_goes_on_at_the_source() {
    let disk = Writable::serve();
    let mut source = disk.guest(Options::default());
    for round in 0..10u8 {
        source.write(0, 7, &[round; 512]);
        let (session, ..) = ready_writable(&disk);
        let base = source.session.stop_queue(0).expect("stop");
        let vring = source.queues[0].ring.vring.clone();
        source.session.start_queue(0, &vring, base).expect("resume");
        assert_eq!(source.read(0, 7, 512), [round; 512]);
        drop(session);
        assert_eq!(source.read(0, 7, 512), [round; 512]);
    }
}

fn ready_writable(disk: &Writable) -> (Session, Memory, Queue) {
    let session = Session::negotiate(disk.daemon.connect(), Wanted::all()).expect("session");
    let memory = Memory::typical();
    session.share(&memory).expect("memory");
    let queue = Queue::new(&memory, 128, session.has(feature::EVENT_IDX));
    session
        .set_up_queue(0, &queue.ring.vring, 0)
        .expect("set up");
    (session, memory, queue)
}

/// The write cache is the running guest's affair until another one runs.
#[test]
fn a_front_end_without_the_disk_does_not_switch_the_write_cache() {
    let disk = Writable::serve();
    let mut old = disk.guest(Options::default());
    let (mut session, memory, queue) = ready_writable(&disk);
    let flags = VhostUserConfigFlags::WRITABLE;
    session
        .frontend
        .set_config(32, flags, &[0])
        .expect("writeback");
    assert_eq!(session.config(32, 1).expect("config"), [0]);
    assert_eq!(old.session.config(32, 1).expect("config"), [1]);
    session.enable(0, true).expect("enable");
    let mut third = ready_writable(&disk).0;
    assert_eq!(third.config(32, 1).expect("config"), [0]);
    drop((queue, memory));
}

/// More connections than are served at a time: the oldest that does not have the disk go.
#[test]
fn connections_without_the_disk_give_way() {
    let disk = Disk::serve();
    let mut guest = disk.guest(Options::default());
    let mut idle: Vec<_> = (0..40)
        .map(|_| {
            let mut raw = Raw::new(disk.daemon.connect());
            assert!(raw.ask(FrontendReq::GET_FEATURES, 0, &[]).is_some());
            raw
        })
        .collect();
    guest.assert_reads(0, &disk.content);
    idle[0].assert_closed();
    let last = idle.last_mut().expect("many");
    assert!(last.ask(FrontendReq::GET_FEATURES, 0, &[]).is_some());
    drop(idle);
    let start = Instant::now();
    while disk.daemon.count("task") > 4 {
        assert!(start.elapsed() < PATIENCE, "their threads go on");
        thread::sleep(Duration::from_millis(5));
    }
    guest.assert_reads(0, &disk.content);
}

/// A process that connects and does nothing else; killed when dropped. This process talks over its connection.
struct OtherProcess(Child);

impl OtherProcess {
    fn connect(path: &Path) -> (Self, UnixStream) {
        let stream: OwnedFd =
            socket(AddressFamily::UNIX, SocketType::STREAM, None).expect("socket");
        let address = SocketAddrUnix::new(path).expect("address");
        let fd = stream.as_raw_fd();
        let mut command = Command::new("sleep");
        command.arg("600");
        // SAFETY: the child makes one system call, on a descriptor that is open until it has run `execve(2)`.
        unsafe {
            command.pre_exec(move || {
                let stream = rustix::fd::BorrowedFd::borrow_raw(fd);
                connect(stream, &address).map_err(Into::into)
            })
        };
        let child = command.spawn().expect("a process that connects");
        (Self(child), stream.into())
    }
}

impl Drop for OtherProcess {
    fn drop(&mut self) {
        self.0.kill().expect("kill");
        self.0.wait().expect("end");
    }
}

/// Two VMMs with one socket, each of which connects again at once when it is hung up on: clones of one VM.
#[test]
fn a_front_end_of_another_process_does_not_steal_the_disk() {
    let disk = Writable::serve();
    let mut owner = disk.guest(Options::default());
    owner.write(0, 7, &[1; 512]);
    for round in 2..12 {
        let (_process, stream) = OtherProcess::connect(&disk.daemon.socket());
        let mut connection = Raw::new(stream.try_clone().expect("socket"));
        // Without a reply to the message that starts the queue, it sees its end.
        let _ = Guest::boot(stream, Options::default());
        connection.assert_closed();
        owner.write(0, 7, &[round; 512]);
        assert_eq!(owner.read(0, 7, 512), [round; 512]);
    }
    let log = disk.daemon.log();
    assert!(
        log.contains("the disk stays with the front-end of process"),
        "{log}"
    );
    assert!(!log.contains("takes over"), "{log}");
    assert!(log.lines().count() < 60, "limited: {log}");
    // Once it has disconnected, others get the disk, although its process runs.
    let (_process, stream) = OtherProcess::connect(&disk.daemon.socket());
    drop(owner);
    let mut next = Guest::boot(stream, Options::default()).expect("guest");
    assert_eq!(next.read(0, 7, 512), [11; 512]);
}

/// A VMM was killed, and another process still holds its connection.
#[test]
fn the_disk_of_a_process_that_has_ended_is_taken_over() {
    let disk = Writable::serve();
    let (process, stream) = OtherProcess::connect(&disk.daemon.socket());
    let mut owner = Guest::boot(stream, Options::default()).expect("guest");
    owner.write(0, 7, &[3; 512]);
    drop(process);
    let mut next = disk.guest(Options::default());
    assert_eq!(next.read(0, 7, 512), [3; 512]);
}

#[test]
fn the_policy_is_an_option() {
    let disk = Disk::serve_with(&["--takeover", "always"]);
    let (_process, stream) = OtherProcess::connect(&disk.daemon.socket());
    let _owner = Guest::boot(stream, Options::default()).expect("guest");
    disk.guest(Options::default())
        .assert_reads(0, &disk.content);
    let disk = Disk::serve_with(&["--takeover", "never"]);
    let mut owner = disk.guest(Options::default());
    let stream = disk.daemon.connect();
    let mut connection = Raw::new(stream.try_clone().expect("socket"));
    let _ = Guest::boot(stream, Options::default());
    connection.assert_closed();
    owner.assert_reads(0, &disk.content);
}
