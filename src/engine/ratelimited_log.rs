//! Rate-limited log for lines that a guest or a front-end can cause.
//!
//! The first lines are logged at once, later ones at one per second, over all queues and connections of the
//! process. A line after a pause says how many were left out.

use std::fmt::Arguments;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use log::Level;

use super::stats::{DiskCell, StatsPage};

/// Lines logged at once after a quiet period.
const BURST: u32 = 32;

/// Target named in the log instead of this module.
const TARGET: &str = env!("CARGO_CRATE_NAME");

/// Time after which one more line is admitted.
const PERIOD: Duration = Duration::from_secs(1);

/// Limit of errors and warnings.
static PROBLEMS: Mutex<Limit> = Mutex::new(Limit::NEW);

/// Limit of informational lines, which never use up that of problems.
static INFO: Mutex<Limit> = Mutex::new(Limit::NEW);

/// Statistics page on which the lines that are left out are counted.
static COUNTED: OnceLock<Arc<StatsPage>> = OnceLock::new();

/// Token bucket of lines, and the count of those left out.
#[derive(Debug)]
struct Limit {
    room: u32,
    /// Time at which `room` was updated last.
    since: Option<Instant>,
    left_out: u64,
}

impl Limit {
    const NEW: Limit = Limit {
        room: BURST,
        since: None,
        left_out: 0,
    };

    /// Admits a line, and returns how many were left out before it; `None` if it is left out too.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        let since = *self.since.get_or_insert(now);
        let periods = now.saturating_duration_since(since).as_secs() / PERIOD.as_secs();
        let more = u32::try_from(periods).unwrap_or(u32::MAX);
        self.room = self.room.saturating_add(more).min(BURST);
        self.since = since.checked_add(PERIOD.saturating_mul(more));
        match self.room.checked_sub(1) {
            Some(room) => {
                self.room = room;
                Some(std::mem::take(&mut self.left_out))
            }
            None => {
                self.left_out += 1;
                None
            }
        }
    }
}

/// Counts the lines that are left out from now on in `page`. Only the first page of a process is used.
pub fn count_in(page: &Arc<StatsPage>) {
    COUNTED.get_or_init(|| page.clone());
}

/// Logs an action of a front-end, within the limit.
pub fn info(message: Arguments<'_>) {
    log(Level::Info, message);
}

/// Logs a warning about a guest or a front-end, within the limit.
pub fn warn(message: Arguments<'_>) {
    log(Level::Warn, message);
}

/// Logs an error about a guest or a front-end, within the limit.
pub fn error(message: Arguments<'_>) {
    log(Level::Error, message);
}

fn log(level: Level, message: Arguments<'_>) {
    let limit = match level {
        Level::Error | Level::Warn => &PROBLEMS,
        _ => &INFO,
    };
    let admitted = limit
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .admit(Instant::now());
    match admitted {
        None => {
            if let Some(page) = COUNTED.get() {
                page.count(DiskCell::LogDropped);
            }
        }
        Some(0) => log::log!(target: TARGET, level, "{message}"),
        Some(more) => {
            log::log!(target: TARGET, level, "{message} ({more} lines left out before it)");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_then_one_a_period() {
        let mut limit = Limit::NEW;
        let start = Instant::now();
        let admitted = (0..100).filter(|_| limit.admit(start).is_some()).count();
        assert_eq!(admitted, BURST as usize);
        assert_eq!(limit.admit(start + PERIOD / 2), None);
        assert_eq!(limit.admit(start + PERIOD), Some(69));
        assert_eq!(limit.admit(start + PERIOD), None);
        assert_eq!(limit.admit(start + PERIOD * 2), Some(1));
        let later = start + PERIOD * 1000;
        let admitted = (0..100).filter(|_| limit.admit(later).is_some()).count();
        assert_eq!(admitted, BURST as usize);
    }
}
