//! Metrics of disks, from their statistics pages.

use super::DiskCell;
use super::exposition::{Exposition, Kind, Labels, seconds};
use super::figures::Figures;
use super::queue::{CODECS, Op, READ_SOURCES, RESULTS, cell};
use crate::io::sigbus::SLOTS;

/// A disk and its values.
#[derive(Debug)]
pub struct DiskFigures {
    /// Value of the label `disk`.
    pub id: String,
    /// Values of its page.
    pub figures: Figures,
}

/// Operations whose bytes are counted, in the order of their cells.
pub(super) const WITH_BYTES: [&str; 3] = ["read", "write", "discard"];

/// Buckets of the rate limits, in the order of their cells.
pub(super) const LIMITS: [&str; 2] = ["ops", "bandwidth"];

/// Gauges: name, help, cell.
pub(super) const GAUGES: [(&str, &str, DiskCell); 10] = [
    ("ovbd_disk_size_bytes", "Size of the disk.", DiskCell::Size),
    (
        "ovbd_disk_upper_used_bytes",
        "Data in the writable layer.",
        DiskCell::UpperUsed,
    ),
    (
        "ovbd_disk_upper_limit_bytes",
        "Limit of the data in the writable layer; absent without a limit.",
        DiskCell::UpperLimit,
    ),
    (
        "ovbd_disk_connected",
        "Whether a front-end has the disk.",
        DiskCell::Connected,
    ),
    (
        "ovbd_disk_queues_active",
        "Running queues.",
        DiskCell::QueuesActive,
    ),
    (
        "ovbd_snapshots_unsealed",
        "Snapshots whose layer is not complete yet.",
        DiskCell::SnapshotsUnsealed,
    ),
    (
        "ovbd_image_table_bytes",
        "Index and block tables of the image.",
        DiskCell::TableBytes,
    ),
    (
        "ovbd_layers_open",
        "Layers of the image that the process has open.",
        DiskCell::Layers,
    ),
    (
        "ovbd_block_cache_bytes",
        "Blocks in the cache of decompressed blocks.",
        DiskCell::BlockCacheBytes,
    ),
    (
        "ovbd_block_cache_limit_bytes",
        "Limit of the cache of decompressed blocks; 0 without a cache.",
        DiskCell::BlockCacheLimit,
    ),
];

/// Counters of the disk without further labels: name, help, cell.
pub(super) const DISK_COUNTERS: [(&str, &str, DiskCell); 4] = [
    (
        "ovbd_frontend_connections",
        "Front-ends that connected.",
        DiskCell::Connections,
    ),
    (
        "ovbd_log_dropped",
        "Log lines that the rate limit of the log left out.",
        DiskCell::LogDropped,
    ),
    (
        "ovbd_block_cache_evictions",
        "Blocks that made room in the cache of decompressed blocks.",
        DiskCell::BlockCacheEvictions,
    ),
    (
        "ovbd_sigbus",
        "Accesses to mapped files that had been truncated, or whose storage failed.",
        DiskCell::Faults,
    ),
];

/// Counters of queues without further labels: name, help, cell.
pub(super) const QUEUE_COUNTERS: [(&str, &str, usize); 7] = [
    (
        "ovbd_bad_chains",
        "Descriptor chains that break a rule of virtio.",
        cell::BAD_CHAINS,
    ),
    (
        "ovbd_resubmitted",
        "Requests of an earlier worker that were repeated.",
        cell::RESUBMITTED,
    ),
    (
        "ovbd_checksum_errors",
        "Reads of layers that failed because a block is damaged.",
        cell::DAMAGED_BLOCKS,
    ),
    (
        "ovbd_block_cache_hits",
        "Reads that the cache of decompressed blocks served.",
        cell::CACHE_HITS,
    ),
    (
        "ovbd_block_cache_misses",
        "Reads of one block that the cache of decompressed blocks did not serve.",
        cell::CACHE_MISSES,
    ),
    (
        "ovbd_fetched_reads",
        "Reads of layers that waited for a registry; they are counted by their source as well.",
        cell::FETCHED_READS,
    ),
    (
        "ovbd_fetched_read_bytes",
        "Stored bytes of reads that waited for a registry.",
        cell::FETCHED_READ_BYTES,
    ),
];

/// Name, help and second label of a family, and its words with their cells.
type ByWord = (
    (&'static str, &'static str, &'static str),
    [(&'static str, DiskCell); 2],
);

/// Counters of the disk with a second label.
pub(super) const BY_WORD: [ByWord; 2] = [
    (
        (
            "ovbd_frontend_errors",
            "Connections that ended with an error.",
            "kind",
        ),
        [
            ("protocol", DiskCell::FrontEndErrors),
            ("takeover_refused", DiskCell::TakeoversRefused),
        ],
    ),
    (
        ("ovbd_snapshots", "Requests for snapshots.", "result"),
        [
            ("ok", DiskCell::SnapshotsTaken),
            ("error", DiskCell::SnapshotsFailed),
        ],
    ),
];

/// Adds the metrics of `disks`. `retired` has the counts of disks that are gone, for sums over all disks.
pub fn write(text: &mut Exposition, disks: &[DiskFigures], retired: &Figures) {
    for (name, help, gauge) in GAUGES {
        text.family(name, Kind::Gauge, help);
        let limited = |value: &u64| gauge != DiskCell::UpperLimit || *value != u64::MAX;
        each(disks, |disk, labels| {
            let value = Some(disk.disk(gauge)).filter(limited);
            value
                .into_iter()
                .for_each(|value| text.sample(labels, value));
        });
    }
    for (name, help, counter) in DISK_COUNTERS {
        text.family(name, Kind::Counter, help);
        each(disks, |disk, labels| {
            text.sample(labels, disk.disk(counter))
        });
    }
    for (name, help, counter) in QUEUE_COUNTERS {
        text.family(name, Kind::Counter, help);
        each(disks, |disk, labels| {
            text.sample(labels, disk.queue(counter))
        });
    }
    disk_counters_by_word(text, disks);
    requests(text, disks, retired);
    throttling(text, disks);
    layer_reads(text, disks);
    blocks_decoded(text, disks);
    watched_ranges(text, disks);
}

/// Calls `add` for each disk with its label.
fn each(disks: &[DiskFigures], mut add: impl FnMut(&Figures, Labels<'_>)) {
    for disk in disks {
        add(&disk.figures, &[("disk", &disk.id)]);
    }
}

/// Counters of the disk's block with a second label.
fn disk_counters_by_word(text: &mut Exposition, disks: &[DiskFigures]) {
    for ((name, help, label), cells) in BY_WORD {
        text.family(name, Kind::Counter, help);
        for disk in disks {
            for (word, counter) in cells {
                let labels = [("disk", disk.id.as_str()), (label, word)];
                text.sample(&labels, disk.figures.disk(counter));
            }
        }
    }
}

fn requests(text: &mut Exposition, disks: &[DiskFigures], retired: &Figures) {
    text.family("ovbd_requests", Kind::Counter, "Requests answered.");
    for disk in disks {
        for op in Op::ALL {
            let counts = disk.figures.requests(op);
            for (result, count) in RESULTS.into_iter().zip(counts) {
                // Only results that most requests have are there from the start.
                if count > 0 || (op != Op::Other && result == "ok") {
                    let labels = [
                        ("disk", disk.id.as_str()),
                        ("op", op.word()),
                        ("result", result),
                    ];
                    text.sample(&labels, count);
                }
            }
        }
    }
    text.family(
        "ovbd_request_bytes",
        Kind::Counter,
        "Bytes of requests that succeeded.",
    );
    for disk in disks {
        for (number, op) in WITH_BYTES.into_iter().enumerate() {
            let labels = [("disk", disk.id.as_str()), ("op", op)];
            text.sample(&labels, disk.figures.queue(cell::BYTES + number));
        }
    }
    durations(text, disks, retired);
}

fn durations(text: &mut Exposition, disks: &[DiskFigures], retired: &Figures) {
    let measured = || Op::ALL.into_iter().filter(|op| *op != Op::Other);
    let nanos = |figures: &Figures, op: Op| figures.queue(cell::DURATION_NANOS + op as usize);
    text.family(
        "ovbd_disk_request_duration_seconds",
        Kind::Summary,
        "Time from taking a request to its answer.",
    );
    for disk in disks {
        for op in measured() {
            let count = saturating_sum(&disk.figures.durations(op));
            if count > 0 {
                let labels = [("disk", disk.id.as_str()), ("op", op.word())];
                text.sum_and_count(&labels, nanos(&disk.figures, op), count);
            }
        }
    }
    let mut all = retired.clone();
    disks.iter().for_each(|disk| all.add(&disk.figures));
    text.family(
        "ovbd_request_duration_seconds",
        Kind::Histogram,
        "Time from taking a request to its answer, over all disks.",
    );
    for op in measured() {
        text.durations(&[("op", op.word())], &all.durations(op), nanos(&all, op));
    }
}

fn throttling(text: &mut Exposition, disks: &[DiskFigures]) {
    let mut family = |name, help, value: &dyn Fn(&Figures, usize) -> f64| {
        text.family(name, Kind::Counter, help);
        for disk in disks {
            for (number, bucket) in LIMITS.into_iter().enumerate() {
                let labels = [("disk", disk.id.as_str()), ("bucket", bucket)];
                text.sample(&labels, value(&disk.figures, number));
            }
        }
    };
    family(
        "ovbd_throttled_requests",
        "Times that a queue waited for a rate limit.",
        &|disk, number| disk.queue(cell::THROTTLED_REQUESTS + number) as f64,
    );
    family(
        "ovbd_throttled_seconds",
        "Time that queues waited for a rate limit.",
        &|disk, number| seconds(disk.queue(cell::THROTTLED_NANOS + number)),
    );
}

fn layer_reads(text: &mut Exposition, disks: &[DiskFigures]) {
    let families = [
        (
            "ovbd_layer_reads",
            "Reads of stored bytes of layers.",
            cell::LAYER_READS,
        ),
        (
            "ovbd_layer_read_bytes",
            "Stored bytes of layers that were read.",
            cell::LAYER_READ_BYTES,
        ),
    ];
    for (name, help, start) in families {
        text.family(name, Kind::Counter, help);
        for disk in disks {
            for (number, source) in READ_SOURCES.into_iter().enumerate() {
                let labels = [("disk", disk.id.as_str()), ("source", source)];
                text.sample(&labels, disk.figures.queue(start + number));
            }
        }
    }
}

fn blocks_decoded(text: &mut Exposition, disks: &[DiskFigures]) {
    text.family(
        "ovbd_blocks_decoded",
        Kind::Counter,
        "Blocks of layers that were decompressed.",
    );
    for disk in disks {
        for (number, codec) in CODECS.into_iter().enumerate() {
            let labels = [("disk", disk.id.as_str()), ("codec", codec)];
            text.sample(&labels, disk.figures.queue(cell::BLOCKS_DECODED + number));
        }
    }
}

fn watched_ranges(text: &mut Exposition, disks: &[DiskFigures]) {
    text.family(
        "ovbd_sigbus_slots",
        Kind::Gauge,
        "Address ranges of mapped files and guest memory that the process can watch.",
    );
    for disk in disks {
        let used = disk.figures.disk(DiskCell::WatchedRanges);
        let free = (SLOTS as u64).saturating_sub(used);
        for (state, count) in [("used", used), ("free", free)] {
            text.sample(&[("disk", disk.id.as_str()), ("state", state)], count);
        }
    }
}

fn saturating_sum(counts: &[u64]) -> u64 {
    counts
        .iter()
        .fold(0, |sum, count| sum.saturating_add(*count))
}
