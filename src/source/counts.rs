//! What a fetcher did, in numbers, as a disk process asks for them.

/// Names of the numbers, in their order.
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

/// The numbers since the fetcher started; `waiting` is the one at this moment.
pub type Counts = [u64; NAMES.len()];
