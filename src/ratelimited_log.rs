//! Rate-limited log for lines that a guest, a front-end, a client, a registry or the storage can cause again and
//! again.
//!
//! The first lines are logged at once, later ones at one per second, over all queues and connections of the
//! process. A line after a pause says how many were left out.

use std::fmt::Arguments;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use log::Level;

/// Lines logged at once after a quiet period.
const BURST: u32 = 32;

/// Target named in the log instead of this module.
const TARGET: &str = env!("CARGO_CRATE_NAME");

/// Time after which one more line is admitted.
const PERIOD: Duration = Duration::from_secs(1);

/// Limits by level: lines of one level never use up the limit of another.
static ERRORS: Mutex<Limit> = Mutex::new(Limit::NEW);
static WARNINGS: Mutex<Limit> = Mutex::new(Limit::NEW);
static INFO: Mutex<Limit> = Mutex::new(Limit::NEW);

/// Called for each line that is left out.
static COUNTER: OnceLock<Box<dyn Fn() + Send + Sync>> = OnceLock::new();

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

/// Calls `counter` for each line that is left out from now on. Only the first counter of a process is used.
pub fn count_with(counter: impl Fn() + Send + Sync + 'static) {
    COUNTER.get_or_init(|| Box::new(counter));
}

/// Logs an action of another party, within the limit.
pub fn info(message: Arguments<'_>) {
    log(Level::Info, message);
}

/// Logs a warning about another party, within the limit.
pub fn warn(message: Arguments<'_>) {
    log(Level::Warn, message);
}

/// Logs an error about another party, within the limit.
pub fn error(message: Arguments<'_>) {
    log(Level::Error, message);
}

fn log(level: Level, message: Arguments<'_>) {
    let limit = match level {
        Level::Error => &ERRORS,
        Level::Warn => &WARNINGS,
        _ => &INFO,
    };
    let admitted = limit
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .admit(Instant::now());
    match admitted {
        None => {
            if let Some(counter) = COUNTER.get() {
                counter();
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
