//! A front-end and a guest that do anything: messages, whole and in pieces, with any descriptors,
//! kicks, and changes of memory, in any order. The session ends, and its queues with it. A writable
//! layer then holds the same when it is opened again, for nothing of it was answered in vain.
//!
//! The session is served inside the sandbox of the daemon (`confined.rs`): a system call that the daemon
//! may not make is a crash.
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
//!
//! The upper bits of the first kind say what disk it is: below 0x80 it is read-only, then a
//! writable layer of each kind above the same image.
#![no_main]

use std::fs::File;
use std::io::{self, IoSlice, PipeReader, Read};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use common::layers::{LayerBuilder, Pack, noise, zfile};
use confined::Confined;
use libfuzzer_sys::fuzz_target;
use ovbd_vhost::engine::rate_limit::LimitsSpec;
use ovbd_vhost::engine::ring::Rings;
use ovbd_vhost::engine::stats::StatsPage;
use ovbd_vhost::engine::{BackendOptions, BlockBackend, Tuning};
use ovbd_vhost::format::lsmt::Header;
use ovbd_vhost::format::lsmt::writable::Kind;
use ovbd_vhost::image::Image;
use ovbd_vhost::image::config::Stack;
use ovbd_vhost::units::{SECTOR_SIZE, Sector, SectorRange};
use ovbd_vhost::vhost::config_change::FrontEnds;
use ovbd_vhost::vhost::ownership::Ownership;
use ovbd_vhost::vhost::serving;
use ovbd_vhost::vhost::session::Session;
use ovbd_vhost::writable::{
    Bounds, Lookup, OnFull, Options, Paths, SpanContent, Volume, WritableLayer, create,
};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tempfile::TempDir;

#[path = "../confined.rs"]
mod confined;
#[path = "../file.rs"]
mod file;

/// Bytes of the files that can become memory, in-flight area and log.
const FILE: u64 = 0x10000;
/// Times to wait in vain in one session, so that there is time for many.
const PATIENCE: u32 = 4;
/// Calls that are waited for after a kick.
const MOST_CALLS: usize = 8;
/// Most descriptors of one message.
const MOST_FDS: usize = 8;

/// Bytes of the disk.
const DISK: u64 = 1 << 20;
/// Bytes that a writable layer may take, and a guest wants more.
const LIMIT: u64 = 768 << 10;

/// Bytes of its file at most: what is freed is used again, though some of it is in small pieces.
const MOST_DATA: u64 = 8 << 20;

/// A layer of which the first half is compressed data.
static LAYER: LazyLock<file::Held> = LazyLock::new(|| {
    let layer = LayerBuilder::new(DISK)
        .data(0, &noise(1, DISK as usize / 2))
        .zeroed(1024, 8);
    file::Held::new(&zfile(&layer.lsmt(), Pack::default()))
});

static READ_ONLY: LazyLock<Arc<BlockBackend>> =
    LazyLock::new(|| backend(Volume::read_only(image())));

fn image() -> Image {
    Image::open(&Stack::new([LAYER.path()])).expect("a layer")
}

fn backend(volume: Volume) -> Arc<BlockBackend> {
    let options = BackendOptions {
        queues: 4,
        queue_size: 64,
        serial: [7; 20],
        block_cache: 0,
        on_full: OnFull::Error,
        tuning: Tuning::default(),
        limits: LimitsSpec::default(),
        stats: StatsPage::anonymous().expect("statistics page"),
    };
    Arc::new(BlockBackend::new(volume.into(), options, Rings::default()))
}

/// A writable layer, and where it lies.
struct Layer {
    folder: TempDir,
    kind: Kind,
}

impl Layer {
    fn create(kind: Kind) -> Self {
        let header = Header {
            index_offset: 0,
            index_entries: 0,
            virtual_size: DISK,
            uuid: uuid::Uuid::from_u128(7),
            parent_uuid: Default::default(),
            message: Vec::new(),
        };
        let layer = Self {
            folder: file::folder(),
            kind,
        };
        create(&layer.paths(), kind, &header).expect("an empty layer");
        layer
    }

    fn paths(&self) -> Paths {
        Paths {
            data: self.folder.path().join("data"),
            index: self.folder.path().join("index"),
        }
    }

    /// Above the image, with little room for anything.
    fn open(&self) -> Volume {
        let options = Options {
            limit: match self.kind {
                Kind::Sparse => u64::MAX,
                _ => LIMIT,
            },
            bounds: Bounds {
                max_pending: 16,
                index_slack: 16,
                ..Bounds::default()
            },
        };
        let upper = WritableLayer::open(&self.paths(), None, &options).expect("what was made here");
        Volume::writable(image(), upper)
    }

    /// No process may have it open.
    fn check(&self, backend: Arc<BlockBackend>) {
        let before = held(backend.volume());
        drop(Arc::into_inner(backend).expect("the session let go of the disk"));
        let data = self.paths().data.metadata().expect("data").len();
        assert!(data <= MOST_DATA, "{data} bytes for a disk of {DISK}");
        assert!(held(&self.open()) == before, "after another opening");
    }
}

/// What each sector holds above the image, if it does.
fn held(volume: &Volume) -> Vec<Option<[u8; SECTOR_SIZE as usize]>> {
    let mut overlay = Lookup::default();
    let mut sectors = Vec::new();
    loop {
        let at = sectors.len() as u64;
        volume.lookup(SectorRange::new(Sector(at), volume.sectors()), &mut overlay);
        if overlay.is_empty() {
            sectors.resize(volume.sectors().0 as usize, None);
            return sectors;
        }
        for span in overlay.spans() {
            let end = sectors.len() + span.sectors.0 as usize;
            match span.content {
                SpanContent::Lower => sectors.resize(end, None),
                SpanContent::Zero => sectors.resize(end, Some([0; _])),
                SpanContent::Data { file, offset } => {
                    let mut bytes = vec![0; span.sectors.bytes() as usize];
                    let read = overlay.file(file).read_exact_at(&mut bytes, offset);
                    read.expect("data of the layer");
                    sectors.extend(bytes.as_chunks().0.iter().copied().map(Some));
                }
            }
        }
    }
}

/// What can be sent: memory, in-flight area, log, kick, call and error; the back-end's channel; a pipe, which
/// no message of a disk has a use for.
struct Fds {
    files: [File; 3],
    kick: OwnedFd,
    other: OwnedFd,
    channel: UnixStream,
    /// The front-end's end, of which nothing is read.
    _channel: UnixStream,
    pipe: PipeReader,
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
        let (channel, _channel) = UnixStream::pair().expect("pair");
        Self {
            files: [file(), file(), file()],
            kick: event(),
            other: event(),
            channel,
            _channel,
            pipe: io::pipe().expect("pipe").0,
        }
    }

    /// Waits a moment for a queue to answer, or to complain, and as long as more comes; returns
    /// whether anything did.
    fn wait_for_calls(&self) -> bool {
        let was_called = |nanoseconds| {
            let mut polled = [PollFd::new(&self.other, PollFlags::IN)];
            let moment = Timespec {
                tv_sec: 0,
                tv_nsec: nanoseconds,
            };
            let _ = poll(&mut polled, Some(&moment));
            rustix::io::read(&self.other, &mut [0; 8]).is_ok()
        };
        let any = was_called(5_000_000);
        if any {
            (0..MOST_CALLS).all(|_| was_called(1_000_000));
        }
        any
    }

    /// Those of a byte: how many in the low bits, then the first of them.
    fn some(&self, byte: u8) -> Vec<BorrowedFd<'_>> {
        let all = [
            self.files[0].as_fd(),
            self.files[1].as_fd(),
            self.files[2].as_fd(),
            self.kick.as_fd(),
            self.other.as_fd(),
            self.channel.as_fd(),
            self.pipe.as_fd(),
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
/// answer; returns whether it came. It does not if a message before is not complete.
fn settle(mut stream: &UnixStream) -> bool {
    const ASKED: [u8; 12] = [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
    const ANSWER: [u8; 12] = [1, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0];
    if !send(stream, &ASKED, &[]) {
        return false;
    }
    let mut answers: Vec<u8> = Vec::new();
    let mut buffer = [0; 4096];
    while !answers.windows(ANSWER.len()).any(|part| part == ANSWER) {
        match stream.read(&mut buffer) {
            Ok(0) | Err(_) => return false,
            Ok(count) => answers.extend(&buffer[..count]),
        }
    }
    true
}

fn take<'b>(bytes: &mut &'b [u8], count: usize) -> &'b [u8] {
    let (now, later) = bytes.split_at(count.min(bytes.len()));
    *bytes = later;
    now
}

/// Performs the steps until they, or the session, end.
fn play(stream: &UnixStream, fds: &Fds, front_ends: &FrontEnds, mut bytes: &[u8]) {
    let mut patience = PATIENCE;
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
                if patience > 0 && !settle(stream) {
                    patience -= 1;
                }
                front_ends.tell_size();
                let _ = rustix::io::write(&fds.kick, &1u64.to_ne_bytes());
                if patience > 0 && !fds.wait_for_calls() {
                    patience -= 1;
                }
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
    let layer = match bytes.first().map_or(0, |first| first / 32) {
        0..4 => None,
        4 | 5 => Some(Kind::Hybrid),
        6 => Some(Kind::Append),
        _ => Some(Kind::Sparse),
    };
    let layer = layer.map(Layer::create);
    let backend = match &layer {
        None => READ_ONLY.clone(),
        Some(layer) => backend(layer.open()),
    };
    let front_ends = FrontEnds::default();
    let session = Session::new(theirs, backend.clone(), &front_ends);
    let folder = layer.as_ref().map(|layer| layer.folder.path().to_owned());
    let serving = Confined::start(folder.into_iter().collect(), move || {
        serving::serve(&session, &Ownership::default())
    });
    let fds = Fds::new();
    play(&ours, &fds, &front_ends, bytes);
    // What was sent is still read, and answered.
    let _ = ours.shutdown(Shutdown::Write);
    let _ = serving.join();
    if let Some(layer) = layer {
        layer.check(backend);
    }
});
