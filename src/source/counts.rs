//! Counters of a fetcher, as a disk process requests them.

/// Names of the counters, in order.
pub const NAMES: [&str; 20] = [
    "start_bytes",
    "demand_bytes",
    "repair_bytes",
    "replay_bytes",
    "read_ahead_bytes",
    "background_bytes",
    "requests",
    "retries",
    "refusals",
    "published",
    "mismatches",
    "waiting",
    "answers_2xx",
    "answers_3xx",
    "answers_401_403",
    "answers_404",
    "answers_429",
    "answers_4xx",
    "answers_5xx",
    "answers_none",
];

/// Values of the counters since the fetcher started; `waiting` is a gauge.
pub type Counts = [u64; NAMES.len()];
