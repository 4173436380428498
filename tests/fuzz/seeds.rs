//! Writes what the fuzz targets start from, into `tmp/fuzz-seeds/TARGET` of the build directory:
//! small images from the golden ones and made to order, and rings and messages of a polite guest.

mod cache;
mod registry;
mod small_stack;

use std::fs;
use std::path::{Path, PathBuf};

use common::golden;
use common::layers::{self, LayerBuilder, Pack, noise, wrap_tar, zfile};
use ovbd_vhost::format::lsmt::Mapping;
use ovbd_vhost::format::tar;
use ovbd_vhost::format::zfile::Algorithm;
use ovbd_vhost::image::config::ImageConfig;
use ovbd_vhost::image::layer::Layer;
use ovbd_vhost::source::Blob;
use ovbd_vhost::units::Sector;

/// Larger golden files are left out: a fuzzer works on what it can change in one go.
const MOST: u64 = 12 << 10;

/// Longer seeds are cut (`-max_len` in `contrib/ci/fuzz`).
const MAX_LEN: usize = 16384;

/// A folder for the seeds of one target, empty.
fn folder(target: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .join("fuzz-seeds")
        .join(target);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).expect("folder");
    folder
}

/// Writes seeds that a fuzzer takes whole; returns how many.
fn write(folder: &Path, seeds: impl IntoIterator<Item = Vec<u8>>) -> usize {
    let seeds = seeds.into_iter().enumerate();
    seeds
        .map(|(number, seed)| {
            assert!((1..=MAX_LEN).contains(&seed.len()), "{} bytes", seed.len());
            fs::write(folder.join(number.to_string()), seed).expect("seed");
        })
        .count()
}

/// Small layers in every form.
fn forms() -> Vec<Vec<u8>> {
    let base = || LayerBuilder::new(1 << 20).without_padding();
    let plain = [
        base().lsmt(),
        base().data(3, &noise(1, 1024)).lsmt(),
        base()
            .data(0, &noise(2, 512))
            .zeroed(7, 40000)
            .data(1 << 42, &noise(3, 1536))
            .lsmt(),
    ];
    let mut all: Vec<_> = plain.to_vec();
    for plain in &plain {
        for algorithm in [Algorithm::Lz4, Algorithm::Zstd] {
            for (checksum, overwrite, block_size, dictionary_len) in [
                (true, true, 4096, 0),
                (false, true, 16384, 0),
                (true, false, 65536, 30),
                (false, false, 4096, 0),
            ] {
                let pack = Pack {
                    algorithm,
                    block_size,
                    checksum,
                    dictionary_len,
                    overwrite,
                };
                let packed = zfile(plain, pack);
                all.push(wrap_tar(&packed));
                all.push(packed);
            }
        }
        all.push(wrap_tar(plain));
    }
    all
}

fn golden_files() -> Vec<Vec<u8>> {
    let layers = golden::cases().into_iter().flat_map(|case| case.layers);
    let small = layers.filter(|path| fs::metadata(path).is_ok_and(|meta| meta.len() <= MOST));
    let mut files: Vec<_> = small
        .map(|path| fs::read(path).expect("golden layer"))
        .collect();
    files.sort_by_key(Vec::len);
    files.dedup();
    files
}

#[test]
fn layer() {
    let folder = folder("layer");
    let forms = forms();
    for (number, bytes) in forms.iter().enumerate() {
        let path = layers::write(&folder, &format!("made-{number}"), bytes);
        let blob = Blob::open(&path).expect("a file that was just written");
        Layer::load(blob.into()).expect("a sound layer");
    }
    assert!(
        write(&folder, golden_files()) > 20,
        "golden layers are small"
    );
}

#[test]
fn tar_heads() {
    let heads = golden::cases()
        .into_iter()
        .flat_map(|case| case.layers)
        .map(|path| fs::read(path).expect("golden layer"))
        .map(|bytes| bytes[..bytes.len().min(tar::PREFIX)].to_vec())
        .filter(|head| matches!(tar::payload(head), Ok(Some(_))))
        .chain([tar::prefix(0).to_vec(), tar::prefix(u64::MAX).to_vec()]);
    assert!(write(&folder("tar"), heads) > 4, "golden tar files");
}

#[test]
fn stack() {
    // Forms, sizes and mappings as `fuzz_targets/stack.rs` reads them.
    let layer = |form: u8, mappings: &[[u8; 4]]| {
        let head = [form * 32 + mappings.len() as u8, 64 + 12];
        [&head, mappings.as_flattened()].concat()
    };
    let below = [[0, 0, 15, 0], [9, 0, 3, 1], [0, 0x40, 200, 0], [4, 0, 0, 9]];
    let above = [[5, 0x40, 30, 0], [1, 0, 7, 3], [2, 0x80, 7, 3]];
    let seeds = (0..8).map(|form| {
        let layers = [layer(form, &below), layer(7 - form, &above), layer(2, &[])];
        [vec![2], layers.concat()].concat()
    });
    assert_eq!(write(&folder("stack"), seeds), 8);
}

#[test]
fn upper() {
    // Kind, size, data and journal as `fuzz_targets/upper.rs` reads them, then the log.
    let data = |start, length, at: u64| Mapping::data(Sector(start), length, Sector(8 + at));
    let zeroed = |start, length| Mapping::zeroed(Sector(start), length, Sector(8));
    let log = [
        data(0, 8, 0),
        data(100, 3, 8),
        zeroed(4, 2),
        data(101, 1, 11),
        zeroed(2000, 30),
        data(2010, 4, 12),
    ];
    let log = log.map(|mapping| mapping.expect("a mapping").encode());
    let seeds = (0..3).flat_map(|kind| {
        let whole = [&[kind, 12, 40, 0], log.as_flattened()].concat();
        let journalled = [&[kind, 12, 40, 1], &[7; 32][..], log.as_flattened()].concat();
        let torn = whole[..whole.len() - 5].to_vec();
        [whole, journalled, torn]
    });
    assert_eq!(write(&folder("upper"), seeds), 9);
}

#[test]
fn image_config() {
    let configs = [
        r#"{"repoBlobUrl":"https://registry/v2/a/blobs","lowers":[{"file":"/dev/null"},{"digest":"sha256:c3a4","size":4737695,"dir":"/dev"}],"upper":{"index":"","data":"","target":"","gzipIndex":""},"resultFile":"/run/result","download":{"enable":false},"accelerationLayer":false,"recordTracePath":""}"#,
        r#"{"lowers":[{"file":"a","targetFile":"b","targetDigest":"c","gzipIndex":"d"}]}"#,
        r#"{"lowers":[{"dir":"/dev/fd","file":""},{"file":null}],"upper":null}"#,
        r#"{"lowers":[],"accelerationLayer":true,"recordTracePath":"t"}"#,
        r#"{"upper":{"index":"i","data":"d","vsize":64}}"#,
    ];
    let folder = folder("image_config");
    assert_eq!(write(&folder, configs.map(Vec::from)), configs.len());
    for number in 0..configs.len() {
        let config = ImageConfig::load(&folder.join(number.to_string()));
        config.expect("a sound image config");
    }
}

/// Memory of a guest with a queue of eight in the places `fuzz_targets/virtqueue.rs` says, which
/// lies at guest address 0x10000: pairs of offset and bytes.
fn requests() -> Vec<(u16, Vec<u8>)> {
    const BASE: u64 = 0x10000;
    let descriptor = |at: u64, len: u32, flags: u16, next: u16| {
        let at = BASE + at;
        let rest = u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48;
        [at.to_le_bytes(), rest.to_le_bytes()].concat()
    };
    let (next, write, indirect) = (1, 2, 4);
    let table = [
        // A read in one piece, the serial, and a read whose data and status are in another table.
        descriptor(0x1000, 16, next, 1),
        descriptor(0x1ff0, 4096, next | write, 2),
        descriptor(0x1800, 1, write, 0),
        descriptor(0x1010, 16, next, 4),
        descriptor(0x1810, 21, write, 0),
        descriptor(0x1020, 16, next, 6),
        descriptor(0x1100, 48, indirect, 0),
        descriptor(0x1030, 17, next | write, 7),
    ];
    let inner = [
        descriptor(0x3000, 512, next | write, 2),
        descriptor(0x1801, 1, write, 0),
        descriptor(0x3200, 1536, next | write, 1),
    ];
    let header = |kind: u64, sector: u64| [kind.to_le_bytes(), sector.to_le_bytes()].concat();
    let available = [0u16, 4, 0, 3, 5, 7, 0, 0, 0, 0, 0];
    let available = available.map(u16::to_le_bytes).as_flattened().to_vec();
    vec![
        (0, available),
        (0x200, table.concat()),
        (
            0x1000,
            [header(0, 7), header(8, 0), header(0, 1021)].concat(),
        ),
        (0x1100, inner.concat()),
    ]
}

#[test]
fn virtqueue() {
    let mut memory = vec![0; 0x1130];
    for (at, bytes) in requests() {
        memory[usize::from(at)..][..bytes.len()].copy_from_slice(&bytes);
    }
    let area = || {
        let mut area = vec![0; 16 + 8 * 16];
        area[8..12].copy_from_slice(&[1, 0, 8, 0]);
        // Two of them are open, and the newer is the lower one.
        for (head, counter) in [(3, 9), (5, 4)] {
            area[16 + 16 * head] = 1;
            area[16 + 16 * head + 8] = counter;
        }
        area.resize(192, 0);
        area
    };
    let seeds = (0..16).map(|flags| {
        let head = [3, 0, 0, flags];
        let area = if flags & 4 != 0 { area() } else { vec![] };
        [&head[..], &memory, &area].concat()
    });
    assert_eq!(write(&folder("virtqueue"), seeds), 16);
}

/// Steps as `fuzz_targets/messages.rs` reads them.
#[derive(Default)]
struct Steps(Vec<u8>);

/// Descriptors of a message: how many, then the first (memory, in-flight area, log, kick, other, socket).
const NO_FD: u8 = 0;
const MEMORY: u8 = 0x01;
const AREA: u8 = 0x11;
const LOG: u8 = 0x21;
const KICK: u8 = 0x31;
const OTHER: u8 = 0x41;
const SOCKET: u8 = 0x51;
const USER: u64 = 0x7f00_0000_0000;

impl Steps {
    fn message(mut self, request: u8, fds: u8, body: &[u64]) -> Self {
        let body = body.iter().flat_map(|word| word.to_le_bytes());
        let body: Vec<u8> = body.collect();
        self.0.extend([0, request, fds, 8, body.len() as u8]);
        self.0.extend(body);
        self
    }

    fn memory(self) -> Self {
        let requests = requests().into_iter();
        requests.fold(self, |steps, (at, bytes)| steps.bytes(at, &bytes))
    }

    fn bytes(mut self, at: u16, bytes: &[u8]) -> Self {
        for (part, bytes) in (0..).zip(bytes.chunks(255)) {
            let [low, high] = (at + 255 * part).to_le_bytes();
            self.0.extend([4, low, high, bytes.len() as u8]);
            self.0.extend(bytes);
        }
        self
    }

    /// SET_CONFIG of that byte: offset, length and flags, then the bytes.
    fn set_writeback(mut self, writeback: u8) -> Self {
        let head = [32u32, 1, 0].map(u32::to_le_bytes);
        self.0.extend([0, 25, NO_FD, 8, 13]);
        self.0.extend(head.as_flattened());
        self.0.push(writeback);
        self
    }

    fn kick(mut self) -> Self {
        self.0.extend([6, 0, 0]);
        self
    }

    fn cut(mut self, file: u8, pages: u8) -> Self {
        self.0.extend([7, file, pages]);
        self
    }

    fn negotiate(self) -> Self {
        self.negotiate_for(0)
    }

    /// With more features than a read-only device has.
    fn negotiate_for(self, more: u64) -> Self {
        self.message(3, NO_FD, &[])
            .message(15, NO_FD, &[])
            // MQ, LOG_SHMFD, REPLY_ACK, CONFIG, INFLIGHT_SHMFD, RESET_DEVICE, memory slots, state
            .message(16, NO_FD, &[0x8b20b])
            .message(2, NO_FD, &[1 << 32 | 1 << 30 | 1 << 29 | 1 << 28 | more])
    }

    /// The same with a disk that can be written to, in the way of this number.
    fn writable(mut self, way: u8) -> Self {
        self.0[0] += 0x80 + 0x20 * way;
        self
    }

    fn table(self) -> Self {
        self.message(5, MEMORY, &[1, 0x10000, 0x10000, USER, 0])
    }

    fn queue(self, index: u64, log: u64) -> Self {
        self.queue_of(8, index, log, 0)
    }

    fn queue_of(self, size: u64, index: u64, log: u64, base: u64) -> Self {
        self.message(8, NO_FD, &[index | size << 32])
            .message(10, NO_FD, &[index | base << 32])
            .message(
                9,
                NO_FD,
                &[index | log << 32, USER + 0x200, USER + 0xC00, USER, 0x10C00],
            )
            .message(14, OTHER, &[index])
            .message(13, OTHER, &[index])
            .message(12, KICK, &[index])
            .message(18, NO_FD, &[index | 1 << 32])
    }
}

const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
/// FLUSH, CONFIG_WCE, DISCARD and WRITE_ZEROES.
const WRITABLE: u64 = 1 << 9 | 1 << 11 | 1 << 13 | 1 << 14;

/// Descriptors of a queue of 32 in the same places, and headers and lists of ranges from 0x1000 on.
#[derive(Default)]
struct Chains {
    table: Vec<u8>,
    heads: Vec<u16>,
    headers: Vec<u8>,
}

impl Chains {
    fn descriptor(&mut self, at: usize, len: usize, write: bool, last: bool) {
        let next = self.table.len() as u64 / 16 + 1;
        let flags = u64::from(!last) | u64::from(write) << 1;
        let at = 0x10000 + at as u64;
        let rest = len as u64 | flags << 32 | next << 48;
        self.table.extend(at.to_le_bytes());
        self.table.extend(rest.to_le_bytes());
    }

    /// A request with so many bytes of data at 0x4000, for or by the device.
    fn request(mut self, kind: u32, sector: u64, out: usize, back: usize) -> Self {
        self.heads.push(self.table.len() as u16 / 16);
        let at = 0x1000 + self.headers.len();
        self.headers.extend(u64::from(kind).to_le_bytes());
        self.headers.extend(sector.to_le_bytes());
        self.descriptor(at, 16, false, false);
        for (len, write) in [(out, false), (back, true)] {
            if len > 0 {
                self.descriptor(0x4000, len, write, false);
            }
        }
        self.descriptor(0x1800 + self.heads.len(), 1, true, true);
        self
    }

    /// A request with ranges: first sector, sectors, flags.
    fn ranges(mut self, kind: u32, ranges: &[[u64; 3]]) -> Self {
        self.heads.push(self.table.len() as u16 / 16);
        let at = 0x1000 + self.headers.len();
        self.headers.extend(u64::from(kind).to_le_bytes());
        self.headers.extend([0; 8]);
        for [start, sectors, flags] in ranges {
            self.headers.extend(start.to_le_bytes());
            self.headers.extend((sectors | flags << 32).to_le_bytes());
        }
        self.descriptor(at, 16 + 16 * ranges.len(), false, false);
        self.descriptor(0x1800 + self.heads.len(), 1, true, true);
        self
    }

    /// Writes it all to memory, and makes as many available as the last parameter says.
    fn lay(&self, steps: Steps, available: usize) -> Steps {
        let heads = self.heads.iter().copied().cycle().take(32);
        let ring = [0, available as u16].into_iter().chain(heads);
        let ring: Vec<u8> = ring.flat_map(u16::to_le_bytes).collect();
        steps
            .bytes(0, &ring)
            .bytes(0x200, &self.table)
            .bytes(0x1000, &self.headers)
            .bytes(0x1800, &[0xEE; 32])
    }
}

/// A request of every kind, those that others overtake among them.
fn changes() -> Chains {
    Chains::default()
        .request(WRITE, 7, 4096, 0)
        .request(WRITE, 600, 1536, 0)
        .request(FLUSH, 0, 0, 0)
        .request(0, 0, 0, 8192)
        .ranges(DISCARD, &[[8, 4, 0], [599, 2, 0]])
        .ranges(WRITE_ZEROES, &[[0, 3, 1], [100, 5, 0]])
        .request(WRITE, 9, 512, 0)
        .request(GET_ID, 0, 0, 20)
        .request(FLUSH, 0, 0, 0)
        .request(0, 4, 0, 8192)
}

#[test]
fn messages() {
    let new = || Steps::default().memory().negotiate();
    // The in-flight area of four queues of eight takes 4 * 192 bytes.
    let tracked = |steps: Steps| steps.message(32, AREA, &[768, 0, 4 | 8 << 16]);
    let seeds = [
        new().table().queue(0, 0).kick().message(11, NO_FD, &[0]),
        // GPU_SET_SOCKET, which no disk takes.
        new().message(33, SOCKET, &[]),
        tracked(new().message(31, NO_FD, &[0, 0, 4 | 8 << 16]))
            .table()
            .queue(0, 0)
            .kick()
            .message(18, NO_FD, &[0])
            .message(34, NO_FD, &[]),
        new()
            .table()
            .message(6, LOG, &[0x1000, 0])
            .queue(0, 1)
            .message(2, NO_FD, &[1 << 32 | 1 << 30 | 1 << 26])
            .kick()
            .message(6, LOG, &[0x800, 0x1000])
            .kick()
            .message(11, NO_FD, &[0]),
        new()
            .message(36, NO_FD, &[])
            .message(37, MEMORY, &[0, 0x10000, 0x8000, USER, 0])
            .message(37, MEMORY, &[0, 0x18000, 0x8000, USER + 0x8000, 0x8000])
            .queue(1, 0)
            .kick()
            .message(38, NO_FD, &[0, 0x18000, 0x8000, USER + 0x8000, 0])
            .kick()
            .message(11, NO_FD, &[1]),
        new().table().queue(0, 0).kick().cut(0, 1).kick(),
        tracked(new()).table().queue(0, 0).cut(1, 0).kick(),
        new()
            .table()
            .message(6, LOG, &[0x1000, 0])
            .message(2, NO_FD, &[1 << 32 | 1 << 30 | 1 << 26])
            .queue(0, 1)
            .cut(2, 0)
            .kick(),
        new()
            .message(17, NO_FD, &[])
            .message(24, NO_FD, &[60 << 32, 1, 0, 0, 0, 0, 0, 0])
            .message(25, NO_FD, &[32 | 1 << 32, 1])
            .message(42, OTHER, &[1])
            .message(43, NO_FD, &[]),
    ];
    let chains = changes();
    let all = chains.heads.len();
    let available = |steps: Steps, count: usize| steps.bytes(2, &(count as u16).to_le_bytes());
    // All in turn, then writes that are durable once answered, then another queue goes on there.
    let session = |way| {
        let steps = chains.lay(Steps::default(), 4).writable(way);
        let steps = steps.negotiate_for(WRITABLE).table();
        let steps = available(steps.queue_of(32, 0, 0, 0).kick(), all).kick();
        let steps = steps.set_writeback(0);
        let steps = available(steps, all + 2).kick().message(11, NO_FD, &[0]);
        let steps = steps.queue_of(32, 1, 0, all as u64 + 2);
        available(steps, all + 5).kick().message(11, NO_FD, &[1])
    };
    // An area of four queues of 32 takes 4 * 576 bytes; a driver that cannot flush; a log.
    let steps = chains.lay(Steps::default(), all).writable(0);
    let through = steps
        .negotiate_for(1 << 26 | 1 << 13 | 1 << 14)
        .message(32, AREA, &[2304, 0, 4 | 32 << 16])
        .message(6, LOG, &[0x1000, 0])
        .table()
        .queue_of(32, 0, 1, 0)
        .kick()
        .kick();
    let again = new().writable(1).table().queue(0, 0).kick();
    // Two writes, of which only the journal knows.
    let steps = chains.lay(Steps::default(), 2).writable(0);
    let unflushed = steps.negotiate_for(WRITABLE).table();
    let unflushed = unflushed.queue_of(32, 0, 0, 0).kick();
    let writing = (0..4).map(session).chain([through, again, unflushed]);
    let seeds = seeds.into_iter().chain(writing);
    let written = write(&folder("messages"), seeds.map(|steps| steps.0));
    assert_eq!(written, 16);
}
