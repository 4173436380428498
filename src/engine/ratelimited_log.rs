//! Logging that neither a guest nor a front-end can flood.
//!
//! What they do wrong is logged, the first lines at once; after that one a second, all queues and
//! connections of the process together, with the number of those left out.

use std::fmt::Arguments;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use log::Level;

/// Lines that are logged at once after a quiet time.
const BURST: u32 = 32;

/// Module named in the log, in place of this one.
const TARGET: &str = env!("CARGO_CRATE_NAME");

/// Time after which there is room for one more.
const PERIOD: Duration = Duration::from_secs(1);

/// Of errors and warnings.
static PROBLEMS: Mutex<Limit> = Mutex::new(Limit::NEW);

/// Of news, which leave no problem out.
static NEWS: Mutex<Limit> = Mutex::new(Limit::NEW);

/// Room for lines, and what did not fit.
#[derive(Debug)]
struct Limit {
    room: u32,
    /// When the room was last counted.
    since: Option<Instant>,
    left_out: u64,
}

impl Limit {
    const NEW: Limit = Limit {
        room: BURST,
        since: None,
        left_out: 0,
    };

    /// Whether there is room for a line now: how many were left out before it.
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

/// Logs what a front-end does, if there is room.
pub fn info(message: Arguments<'_>) {
    say(Level::Info, message);
}

/// Logs a warning about a guest or a front-end, if there is room.
pub fn warn(message: Arguments<'_>) {
    say(Level::Warn, message);
}

/// Logs an error about a guest or a front-end, if there is room.
pub fn error(message: Arguments<'_>) {
    say(Level::Error, message);
}

fn say(level: Level, message: Arguments<'_>) {
    let limit = match level {
        Level::Error | Level::Warn => &PROBLEMS,
        _ => &NEWS,
    };
    let admitted = limit
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .admit(Instant::now());
    match admitted {
        None => {}
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
