//! A front-end and a guest that do anything: messages, whole and in pieces, with any descriptors,
//! kicks, and changes of memory, in any order. The session ends, and its queues with it.
//!
//! An input is a list of steps, each a byte with its kind and two arguments:
//!
//! | kind | step | arguments |
//! |---|---|---|
//! | 0, 1, 2 | a message, its length right | request, descriptors, flags, body |
//! | 3 | bytes as they are | descriptors, bytes |
//! | 4, 5 | bytes written to memory | place, bytes |
//! | 6 | a kick, and a moment for it | - |
//! | 7 | a file cut short or made whole | which, pages |
#![no_main]

use std::fs::File;
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use ovbd_vhost::engine::{Disk, Tuning};
use ovbd_vhost::image::Image;
use ovbd_vhost::image::spec::Stack;
use ovbd_vhost::upper::Volume;
use ovbd_vhost::vhost::session;
use ovbd_vhost::virtio::config::DeviceConfig;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

#[path = "../file.rs"]
mod file;
#[path = "../../common/layers.rs"]
mod layers;

use layers::{LayerBuilder, Pack, noise, zfile};

/// Bytes of the files that can become memory, in-flight area and log.
const FILE: u64 = 0x10000;
/// Most descriptors of one message.
const MOST_FDS: usize = 8;

/// A disk of 1 MiB, the first half of it in compressed data.
static DISK: LazyLock<Arc<Disk>> = LazyLock::new(|| {
    let layer = LayerBuilder::new(1 << 20)
        .data(0, &noise(1, 1 << 19))
        .zeroed(1024, 8);
    let held = file::Held::new(&zfile(&layer.lsmt(), Pack::default()));
    let image = Image::open(&Stack::new([held.path()])).expect("a layer");
    let config = DeviceConfig {
        capacity: image.sectors(),
        queues: 4,
        queue_size: 64,
        optimal_io: 4096,
        writable: false,
    };
    let tuning = Tuning {
        poll: Duration::ZERO,
        io_uring: false,
        readahead: 0,
        drop_cache: false,
        cpus: Vec::new(),
    };
    Arc::new(Disk {
        volume: Volume::read_only(image),
        config,
        writeback: AtomicBool::new(true),
        serial: [7; 20],
        cache: None,
        tuning,
    })
});

/// What can be sent: memory, in-flight area, log, kick, call and error.
struct Fds {
    files: [File; 3],
    kick: OwnedFd,
    other: OwnedFd,
}

impl Fds {
    fn new() -> Self {
        let file = || {
            let flags = rustix::fs::MemfdFlags::CLOEXEC;
            let file = File::from(rustix::fs::memfd_create("m", flags).expect("memfd"));
            file.set_len(FILE).expect("memory");
            file
        };
        let event = || eventfd(0, EventfdFlags::NONBLOCK).expect("eventfd");
        Self {
            files: [file(), file(), file()],
            kick: event(),
            other: event(),
        }
    }

    /// Waits a moment for a queue to answer, or to complain.
    fn wait_for_call(&self) {
        let mut polled = [PollFd::new(&self.other, PollFlags::IN)];
        let moment = Timespec {
            tv_sec: 0,
            tv_nsec: 2_000_000,
        };
        let _ = poll(&mut polled, Some(&moment));
        let _ = rustix::io::read(&self.other, &mut [0; 8]);
    }

    /// Those of a byte: how many in the low bits, then the first of them.
    fn some(&self, byte: u8) -> Vec<BorrowedFd<'_>> {
        let all = [
            self.files[0].as_fd(),
            self.files[1].as_fd(),
            self.files[2].as_fd(),
            self.kick.as_fd(),
            self.other.as_fd(),
        ];
        let first = usize::from(byte / 16);
        let count = usize::from(byte % 16).min(MOST_FDS);
        let endless = all.iter().cycle().skip(first % all.len());
        endless.take(count).copied().collect()
    }
}

fn send(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(fds));
    }
    let flags = SendFlags::NOSIGNAL;
    sendmsg(stream, &[IoSlice::new(bytes)], &mut control, flags).is_ok()
}

/// Lets the session take all messages that were sent: asks for its features, and waits for the
/// answer. None comes if a message before is not complete.
fn settle(mut stream: &UnixStream) {
    const ASKED: [u8; 12] = [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
    const ANSWER: [u8; 12] = [1, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0];
    if !send(stream, &ASKED, &[]) {
        return;
    }
    let mut answers: Vec<u8> = Vec::new();
    let mut buffer = [0; 4096];
    while !answers.windows(ANSWER.len()).any(|part| part == ANSWER) {
        match stream.read(&mut buffer) {
            Ok(0) | Err(_) => return,
            Ok(count) => answers.extend(&buffer[..count]),
        }
    }
}

fn take<'b>(bytes: &mut &'b [u8], count: usize) -> &'b [u8] {
    let (now, later) = bytes.split_at(count.min(bytes.len()));
    *bytes = later;
    now
}

/// Performs the steps until they, or the session, end.
fn play(stream: &UnixStream, fds: &Fds, mut bytes: &[u8]) {
    for _ in 0..64 {
        let &[kind, first, second, ref rest @ ..] = bytes else {
            return;
        };
        bytes = rest;
        let goes_on = match kind % 8 {
            0..3 => {
                let [flags, len] = *take(&mut bytes, 2) else {
                    return;
                };
                let body = take(&mut bytes, len.into());
                let head = [u32::from(first), u32::from(flags | 1), body.len() as u32];
                let head = head.map(u32::to_le_bytes);
                let message = [head.as_flattened(), body].concat();
                send(stream, &message, &fds.some(second))
            }
            3 => {
                let raw = take(&mut bytes, second.into());
                send(stream, raw, &fds.some(first))
            }
            4 | 5 => {
                let [len] = *take(&mut bytes, 1) else { return };
                let at = u64::from(u16::from_le_bytes([first, second]));
                // A file that was cut grows again.
                fds.files[0]
                    .write_all_at(take(&mut bytes, len.into()), at)
                    .expect("memory");
                true
            }
            6 => {
                settle(stream);
                let _ = rustix::io::write(&fds.kick, &1u64.to_ne_bytes());
                fds.wait_for_call();
                true
            }
            _ => {
                let file = &fds.files[usize::from(first) % 3];
                file.set_len(u64::from(second) * 0x1000).expect("memory");
                true
            }
        };
        if !goes_on {
            return;
        }
    }
}

fuzz_target!(|bytes: &[u8]| {
    let (ours, theirs) = UnixStream::pair().expect("pair");
    ours.set_write_timeout(Some(Duration::from_secs(1)))
        .expect("socket");
    ours.set_read_timeout(Some(Duration::from_millis(10)))
        .expect("socket");
    let disk = DISK.clone();
    let serving = std::thread::spawn(move || session::serve(theirs, disk));
    let fds = Fds::new();
    play(&ours, &fds, bytes);
    // What was sent is still read, and answered.
    let _ = ours.shutdown(Shutdown::Write);
    let _ = serving.join().expect("the session panicked");
});
