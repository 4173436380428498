//! A disk that grows while a front-end uses it.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use ovbd_vhost::format::lsmt::writable::Kind;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Resource, Rlimit, getrlimit, prlimit};
use serde_json::{Value, json};
use tempfile::TempDir;
use vhost::vhost_user::message::FrontendReq;
use vhost::vhost_user::{VhostUserFrontend, VhostUserProtocolFeatures as Protocol};

use super::control::ask;
use super::{assert_beginning, write};
use common::PATIENCE;
use common::blk::{self, DISCARD, IN, IOERR, OUT, SECTOR, WRITE_ZEROES};
use common::daemon::Daemon;
use common::disk::Disk;
use common::guest::{Guest, Options};
use common::programs;
use common::raw::{NEED_REPLY, Raw};
use common::session::{Session, Wanted};
use common::writable::Writable;

/// By how much a disk grows.
const MORE: u64 = 48 << 20;

/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG of version 1, which asks for no reply, without a body.
const CHANGED: [u8; 12] = [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];

const KINDS: [Kind; 3] = [Kind::Append, Kind::Sparse, Kind::Hybrid];

/// A disk that can grow.
struct Growing {
    disk: Writable,
    /// Where the control socket is.
    folder: TempDir,
}

impl Growing {
    fn serve(kind: Kind) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("control");
        let options = ["--control", socket.to_str().unwrap()];
        let disk = Writable::serve_kind(kind, &options);
        Self { disk, folder }
    }

    fn control(&self) -> PathBuf {
        self.folder.path().join("control")
    }

    fn ask(&self, method: &str, path: &str, body: &str) -> (u16, Value) {
        ask(&self.control(), method, path, body).unwrap()
    }

    fn put(&self, size: u64) -> (u16, Value) {
        let body = json!({ "size_bytes": size }).to_string();
        self.ask("PUT", "/api/v1/size", &body)
    }

    fn grow(&self, size: u64) {
        assert_eq!(self.put(size), (200, json!({ "size_bytes": size })));
        assert_eq!(self.size(), size);
    }

    /// What the control socket says.
    fn size(&self) -> u64 {
        let (status, device) = self.ask("GET", "/api/v1/device", "");
        assert_eq!(status, 200);
        device["size_bytes"].as_u64().unwrap()
    }

    /// The size at first.
    fn original(&self) -> u64 {
        self.disk.content.len() as u64
    }

    /// A guest whose front-end has a channel and has read the size, and the front-end's end of the channel.
    fn guest(&self) -> (Guest, UnixStream) {
        let mut guest = self.disk.guest(with_channel());
        guest.session.capacity().unwrap();
        let channel = give_channel(&mut guest.session);
        (guest, channel)
    }
}

fn with_channel() -> Options {
    let mut wanted = Wanted::all();
    wanted.protocol |= Protocol::BACKEND_REQ;
    Options {
        wanted,
        ..Options::default()
    }
}

/// Gives the daemon a channel; returns the front-end's end.
fn give_channel(session: &mut Session) -> UnixStream {
    let (own, theirs) = UnixStream::pair().unwrap();
    session.frontend.set_backend_request_fd(&theirs).unwrap();
    own.set_read_timeout(Some(PATIENCE)).unwrap();
    own
}

/// Waits for one message.
fn assert_told(channel: &mut UnixStream) {
    let mut message = [0; 12];
    channel.read_exact(&mut message).unwrap();
    assert_eq!(message, CHANGED);
}

/// Nothing is left in the channel once the daemon has answered what came before.
fn assert_not_told(channel: &mut UnixStream) {
    channel.set_nonblocking(true).unwrap();
    let error = channel.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    channel.set_nonblocking(false).unwrap();
}

#[test]
fn a_disk_grows_under_load() {
    for kind in KINDS {
        let mut growing = Growing::serve(kind);
        let (mut guest, mut channel) = growing.guest();
        let mut model = growing.disk.content.to_vec();
        let (old, new) = (growing.original(), growing.original() + MORE);
        let old_end = old / SECTOR;
        assert_eq!(guest.request(0, IN, old_end, 512).status, IOERR);
        assert_eq!(guest.send(0, OUT, old_end - 1, &[1; 1024]), IOERR);
        let grown = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                for part in 1..=8 {
                    growing.grow(old + MORE * part / 8);
                }
                grown.store(true, Ordering::Release);
            });
            for round in 0.. {
                let (start, fill) = (round * 7 % 3000, round as u8);
                write(&mut guest, &mut model, start, &[fill; 9 * 512]);
                if round % 5 == 0 {
                    guest.flush(0);
                }
                let at = (start * SECTOR) as usize;
                assert_eq!(guest.read(0, start, 9 * 512), &model[at..at + 9 * 512]);
                if grown.load(Ordering::Acquire) {
                    break;
                }
            }
        });
        // Once for each step, as it never read another size.
        (0..8).for_each(|_| assert_told(&mut channel));
        assert_eq!(guest.session.capacity().unwrap() * SECTOR, new);
        growing.grow(new);
        assert_not_told(&mut channel);

        model.resize(new as usize, 0);
        let end = new / SECTOR;
        write(&mut guest, &mut model, old_end - 5, &[0xAA; 11 * 512]);
        write(&mut guest, &mut model, end - 9, &[0xBB; 9 * 512]);
        super::zero(&mut guest, &mut model, DISCARD, old_end + 1, 2, false);
        super::zero(&mut guest, &mut model, WRITE_ZEROES, end - 8, 2, true);
        guest.flush(0);
        let range = blk::range(end - 1, 2, 0);
        assert_eq!(guest.send(0, DISCARD, 0, &range), IOERR);
        assert_eq!(guest.request(0, IN, end, 512).status, IOERR);
        super::assert_disk(&mut guest, &model);

        // Another front-end takes over.
        let (mut guest, mut channel) = growing.guest();
        assert_eq!(guest.session.capacity().unwrap() * SECTOR, new);
        super::assert_disk(&mut guest, &model);
        assert_not_told(&mut channel);
        drop(guest);
        // Another process, or another start of the system.
        growing.disk.crash();
        let mut guest = growing.disk.plain_guest();
        assert_eq!(guest.session.capacity().unwrap() * SECTOR, new);
        super::assert_disk(&mut guest, &model);
        drop(guest);
        growing.disk.lose_power();
        let mut guest = growing.disk.plain_guest();
        assert_eq!(guest.session.capacity().unwrap() * SECTOR, new);
        super::assert_disk(&mut guest, &model);
        assert_eq!(guest.request(0, IN, end, 512).status, IOERR);
    }
}

/// After a restart of the daemon QEMU reads no configuration space; what it relies on is of an earlier connection.
#[test]
fn a_front_end_that_relies_on_an_earlier_connection_is_told_when_it_starts() {
    let growing = Growing::serve(Kind::Hybrid);
    growing.grow(growing.original() + MORE);
    let negotiate = || Session::negotiate(growing.disk.daemon.connect(), with_channel().wanted);
    let mut session = negotiate().unwrap();
    let mut channel = give_channel(&mut session);
    assert_not_told(&mut channel);
    drop(session);

    let mut guest = growing.disk.guest(with_channel());
    let mut channel = give_channel(&mut guest.session);
    assert_told(&mut channel);
    guest.session.capacity().unwrap();
    // Read the old size, and gave the channel when the disk had grown.
    growing.grow(growing.original() + 2 * MORE);
    assert_told(&mut channel);
    let mut channel = give_channel(&mut guest.session);
    assert_told(&mut channel);
    guest.session.capacity().unwrap();
    let mut channel = give_channel(&mut guest.session);
    assert_not_told(&mut channel);
}

#[test]
fn what_cannot_be_is_refused_with_the_reason() {
    let growing = Growing::serve(Kind::Hybrid);
    let size = growing.original();
    for (body, status, text) in [
        (
            json!({ "size_bytes": size - 512 }),
            409,
            "can grow, not shrink",
        ),
        (json!({ "size_bytes": 0 }), 409, "can grow, not shrink"),
        (json!({ "size_bytes": size + 1 }), 400, "multiple of 512"),
        (json!({ "size_bytes": (1_u64 << 59) + 512 }), 400, "2^59"),
        (json!({ "size_bytes": -1 }), 400, "size_bytes"),
        (json!({ "size_bytes": size, "more": 1 }), 400, "size_bytes"),
        (json!(size), 400, "size_bytes"),
    ] {
        let (found, answer) = growing.ask("PUT", "/api/v1/size", &body.to_string());
        assert_eq!(found, status, "{body}: {answer}");
        assert!(answer["error"].as_str().unwrap().contains(text), "{answer}");
    }
    assert_eq!(growing.ask("GET", "/api/v1/size", "").0, 405);
    assert_eq!(growing.size(), size);
    growing.grow(size);
    let mut guest = growing.disk.plain_guest();
    assert_eq!(guest.session.capacity().unwrap() * SECTOR, size);
    assert_beginning(&mut guest, &growing.disk.content);

    let socket = growing.folder.path().join("read-only");
    let disk = Disk::serve_with(&["--control", socket.to_str().unwrap()]);
    let body = json!({ "size_bytes": size + 512 }).to_string();
    let (status, answer) = ask(&socket, "PUT", "/api/v1/size", &body).unwrap();
    assert_eq!(status, 409);
    let text = answer["error"].as_str().unwrap();
    assert!(text.contains("read-only"), "{text}");
    drop(disk);
}

#[test]
fn the_tool_grows_a_disk() {
    let growing = Growing::serve(Kind::Hybrid);
    let ctl = |size: &str| {
        let mut ovbd = Command::new(programs::path("ovbd"));
        ovbd.arg("ctl").arg(growing.control());
        ovbd.args(["resize", size]).output().unwrap()
    };
    let done = ctl("1G");
    assert!(done.status.success(), "{done:?}");
    let answer: Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(answer, json!({ "size_bytes": 1 << 30 }));
    assert_eq!(growing.size(), 1 << 30);
    let refused = ctl("1M");
    assert_eq!(refused.status.code(), Some(1));
    let text = String::from_utf8(refused.stderr).unwrap();
    assert!(text.contains("not shrink to 1048576 bytes"), "{text}");
}

#[test]
fn snapshots_keep_their_size() {
    let growing = Growing::serve(Kind::Hybrid);
    let (mut guest, _channel) = growing.guest();
    let mut model = growing.disk.content.to_vec();
    let snapshot = |name: &str| {
        let body = json!({ "name": name, "wait": true }).to_string();
        let (status, answer) = growing.ask("POST", "/api/v1/snapshots", &body);
        assert_eq!(status, 200, "{answer}");
        let layers = answer["layers"].as_array().unwrap().clone();
        let layers = layers.iter().map(|layer| layer.as_str().unwrap().into());
        layers.collect::<Vec<PathBuf>>()
    };
    let mut taken = Vec::new();
    for round in 0..3_u8 {
        let end = model.len() as u64 / SECTOR;
        write(&mut guest, &mut model, end - 20, &[round + 1; 9 * 512]);
        taken.push((snapshot(&format!("round {round}")), model.clone()));
        let size = model.len() as u64 + MORE;
        growing.grow(size);
        model.resize(size as usize, 0);
        // Over the old end.
        write(&mut guest, &mut model, end - 10, &[round + 11; 20 * 512]);
        super::assert_disk(&mut guest, &model);
    }
    for (layers, model) in taken {
        let fork = Daemon::serve(&layers);
        let mut guest = Guest::boot(fork.connect(), Options::default()).unwrap();
        let size = guest.session.capacity().unwrap() * SECTOR;
        assert_eq!(size, model.len() as u64);
        super::assert_disk(&mut guest, &model);
    }
}

/// A limit of the file's length is the full disk of a sparse layer.
#[test]
fn a_size_that_storage_refuses_leaves_the_old_one() {
    let mut growing = Growing::serve(Kind::Sparse);
    let (mut guest, mut channel) = growing.guest();
    let (old, new) = (growing.original(), growing.original() + MORE);
    let maximum = getrlimit(Resource::Fsize).maximum;
    let limit = |current| {
        let limit = Rlimit { current, maximum };
        let pid = Some(growing.disk.daemon.pid());
        prlimit(pid, Resource::Fsize, limit).unwrap();
    };
    limit(Some(old + MORE / 2));
    let (status, answer) = growing.put(new);
    assert_eq!(status, 500, "{answer}");
    let text = answer["error"].as_str().unwrap();
    assert!(text.contains("cannot enlarge"), "{text}");
    assert_eq!(growing.size(), old);
    assert_eq!(guest.session.capacity().unwrap() * SECTOR, old);
    assert_not_told(&mut channel);
    guest.write(0, 0, &[7; 512]);
    guest.flush(0);
    limit(maximum);
    growing.grow(new);
    assert_told(&mut channel);
    guest.write(0, new / SECTOR - 1, &[8; 512]);
    growing.disk.daemon.assert_alive();
}

/// A front-end that does not read its channel, or has closed it, holds nothing up.
#[test]
fn a_channel_that_takes_nothing() {
    let mut growing = Growing::serve(Kind::Hybrid);
    let onlooker = || {
        let stream = growing.disk.daemon.connect();
        let mut session = Session::negotiate(stream, with_channel().wanted).unwrap();
        session.capacity().unwrap();
        session
    };
    let (mut silent, mut closed, mut filled) = (onlooker(), onlooker(), onlooker());
    let mut unread = give_channel(&mut silent);
    drop(give_channel(&mut closed));
    // The front-end has the daemon's end as well, and fills it.
    let (_own, theirs) = UnixStream::pair().unwrap();
    let given = filled.frontend.set_backend_request_fd(&theirs);
    given.unwrap();
    theirs.set_nonblocking(true).unwrap();
    while (&theirs).write(&[0; 4096]).is_ok() {}
    theirs.set_nonblocking(false).unwrap();
    let (mut guest, mut channel) = growing.guest();
    // More than a socket has room for.
    for step in 1..=600 {
        growing.grow(growing.original() + step * 512);
    }
    assert_told(&mut unread);
    assert_told(&mut channel);
    for session in [&mut silent, &mut closed, &mut filled, &mut guest.session] {
        let size = session.capacity().unwrap() * SECTOR;
        assert_eq!(size, growing.original() + 600 * 512);
    }
    let end = growing.size() / SECTOR;
    guest.write(0, end - 1, &[1; 512]);
    assert_beginning(&mut guest, &growing.disk.content);
    growing.disk.daemon.assert_alive();
}

#[test]
fn a_channel_that_is_no_unix_stream_is_refused() {
    let growing = Growing::serve(Kind::Hybrid);
    let (pipe, _writer) = std::io::pipe().unwrap();
    let (datagram, _peer) = UnixDatagram::pair().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let tcp = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let memory = memfd_create("memory", MemfdFlags::CLOEXEC).unwrap();
    let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let (unix, _other) = UnixStream::pair().unwrap();
    let fds = [
        pipe.as_raw_fd(),
        datagram.as_raw_fd(),
        tcp.as_raw_fd(),
        memory.as_raw_fd(),
        event.as_raw_fd(),
    ];
    let mut raw = Raw::new(growing.disk.daemon.connect());
    let mut give = |fds: &[i32]| {
        assert!(raw.send(FrontendReq::SET_BACKEND_REQ_FD, NEED_REPLY, &[], fds));
        raw.receive().unwrap().number()
    };
    for fd in fds {
        assert_ne!(give(&[fd]), 0);
    }
    let unix = unix.as_raw_fd();
    assert_ne!(give(&[]), 0);
    assert_ne!(give(&[unix, unix]), 0);
    assert_eq!(give(&[unix]), 0);
}
