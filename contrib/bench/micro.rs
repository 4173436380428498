//! Micro-benchmarks of the read path's parts: `cargo bench --bench micro`.
//!
//! They count processor time of their thread, but for opening, which has many and is waited for.
#![allow(missing_docs)] // What `criterion_group!` makes has none.

mod thread_time;
mod wide;

use std::fs::File;
use std::hint::black_box;

use common::content::Random;
use criterion::measurement::WallTime;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ovbd_vhost::codec::{Decoder, Encoder};
use ovbd_vhost::format::crc;
use ovbd_vhost::format::zfile::Algorithm;
use ovbd_vhost::image::Image;
use ovbd_vhost::image::config::Stack;
use ovbd_vhost::image::index::Index;
use ovbd_vhost::image::segment::{self, Segment};
use ovbd_vhost::units::Sector;
use ovbd_vhost::virtio::chain::Chain;
use ovbd_vhost::virtio::config::DeviceConfig;
use ovbd_vhost::virtio::memory::{Memory, RegionInfo};
use ovbd_vhost::virtio::request::Operation;
use thread_time::ThreadTime;
use vm_memory::{Bytes, GuestAddress, VolatileSlice};

const BLOCK: usize = 4096;

/// Blocks of this program, which are as good as any other's.
fn blocks() -> Vec<Vec<u8>> {
    let program = std::env::current_exe()
        .and_then(std::fs::read)
        .expect("own program");
    let blocks = program
        .chunks_exact(BLOCK)
        .filter(|block| block.iter().any(|byte| *byte != 0));
    blocks.take(2048).map(<[u8]>::to_vec).collect()
}

fn decode(criterion: &mut Criterion<ThreadTime>) {
    let mut group = criterion.benchmark_group("decode a 4 KiB block");
    group.throughput(Throughput::Bytes(BLOCK as u64));
    let blocks = blocks();
    let mut target = vec![0; BLOCK];
    for algorithm in [Algorithm::Lz4, Algorithm::Zstd] {
        let mut encoder = Encoder::new();
        let encoded = blocks.iter().map(|block| {
            let mut stored = Vec::new();
            encoder.encode(algorithm, block, &mut stored).expect("room");
            stored
        });
        let encoded: Vec<_> = encoded.collect();
        let mut stored = encoded.iter().cycle();
        let mut decoder = Decoder::default();
        group.bench_function(algorithm.to_string(), |bencher| {
            bencher.iter(|| {
                let into = VolatileSlice::from(target.as_mut_slice());
                let stored = stored.next().expect("endless");
                decoder
                    .decode(algorithm, black_box(stored), &into)
                    .expect("a good block");
            });
        });
    }
}

fn checksum(criterion: &mut Criterion<ThreadTime>) {
    let mut group = criterion.benchmark_group("CRC-32C");
    let bytes = vec![0x5a; BLOCK];
    for len in [512, 2048, BLOCK] {
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_function(format!("{len} bytes"), |bencher| {
            bencher.iter(|| crc::raw(crc::BLOCK_SEED, black_box(&bytes[..len])));
        });
    }
}

/// Segments as the layers of [`wide`] have them.
fn segments(numbers: impl Iterator<Item = u64>) -> Vec<Segment> {
    let segment = |number| Segment::new(wide::mapping(number), 0).expect("a small layer");
    numbers.map(segment).collect()
}

fn look_up(criterion: &mut Criterion<ThreadTime>) {
    const QUERIES: usize = 1 << 16;
    let mut group = criterion.benchmark_group("look up a 4 KiB read in the index");
    group.throughput(Throughput::Elements(QUERIES as u64));
    for count in [4_500, 100_000, 1_000_000] {
        let index = Index::new(&segments(0..count));
        let blocks = wide::sectors(count) / wide::SECTORS;
        let mut random = Random::new(1);
        let queries = std::iter::repeat_with(|| Sector(random.below(blocks) * wide::SECTORS));
        let queries: Vec<_> = queries.take(QUERIES).collect();
        group.bench_function(format!("{count} segments"), |bencher| {
            bencher.iter(|| {
                for query in &queries {
                    black_box(index.find(*query));
                }
            });
        });
    }
}

fn merge(criterion: &mut Criterion<ThreadTime>) {
    let mut group = criterion.benchmark_group("merge");
    group.sample_size(20);
    let (lower, upper) = (
        segments((0..1_000_000).step_by(2)),
        segments((1..1_000_000).step_by(2)),
    );
    group.throughput(Throughput::Elements(1_000_000));
    group.bench_function("two layers, 1,000,000 mappings", |bencher| {
        bencher.iter(|| segment::merge(black_box(&lower).iter().copied(), black_box(&upper)));
    });
    let all = segments(0..1_000_000);
    group.bench_function("index of 1,000,000 segments", |bencher| {
        bencher.iter(|| Index::new(black_box(&all)));
    });
}

fn open(criterion: &mut Criterion<WallTime>) {
    let mut group = criterion.benchmark_group("open 255 layers and merge them");
    group.sample_size(20);
    for mappings in [10_000, 100_000, 1_000_000] {
        let dir = tempfile::tempdir().expect("temporary directory");
        let stack = Stack::new(wide::write(dir.path(), 255, mappings));
        group.throughput(Throughput::Elements(mappings));
        group.bench_function(format!("{mappings} mappings"), |bencher| {
            bencher.iter_with_large_drop(|| Image::open(&stack).expect("good layers"));
        });
    }
}

fn request(criterion: &mut Criterion<ThreadTime>) {
    const GUEST: u64 = 0x1_0000;
    const LEN: u64 = 1 << 20;
    let file = tempfile::tempfile().expect("temporary file");
    File::set_len(&file, LEN).expect("a MiB");
    let info = RegionInfo {
        guest: GUEST,
        len: LEN,
        user: 0,
        file_offset: 0,
    };
    let memory = Memory::default().with_region(info, file).expect("memory");
    let mut group = criterion.benchmark_group("walk a chain and parse its request");
    for segments in [1, 32] {
        // Header, data, status: the table is at the start, the header after it.
        let table = memory.slice(GuestAddress(GUEST), 64 * 16).expect("table");
        for number in 0..segments + 2 {
            let (address, len, flags) = match number {
                0 => (0x800, 16, 1),
                last if last == segments + 1 => (0x900, 1, 2),
                data => (data << 12, 4096, 3),
            };
            let rest = len | flags << 32 | (number + 1) << 48;
            table
                .write_obj((GUEST + address).to_le(), number as usize * 16)
                .expect("address");
            table
                .write_obj(rest.to_le(), number as usize * 16 + 8)
                .expect("rest");
        }
        let mut chain = Chain::default();
        let config = DeviceConfig {
            queues: 1,
            queue_size: 256,
            optimal_io: 4096,
            writable: false,
        };
        group.bench_function(format!("{segments} pieces of data"), |bencher| {
            bencher.iter(|| {
                chain.walk(&memory, table, 0, true).expect("a good chain");
                let operation = Operation::parse(&chain, &config, Sector(1 << 30));
                assert!(black_box(operation).is_ok());
            });
        });
    }
}

criterion_group! {
    name = one_thread;
    config = Criterion::default().with_measurement(ThreadTime);
    targets = decode, checksum, look_up, merge, request
}
criterion_group!(many_threads, open);
criterion_main!(one_thread, many_threads);
