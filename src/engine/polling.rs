//! Busy-polling of the available ring before a worker sleeps.
//!
//! A sleep costs the guest a kick and the worker a wake-up; polling costs processor time. The polling window
//! adapts: it is reset to its longest when a request comes within it, and halved when none does.
#![cfg_attr(not(test), warn(clippy::indexing_slicing))]

use std::time::{Duration, Instant};

/// Shortest window that is not set to zero.
const LEAST: Duration = Duration::from_micros(1);

/// The polling window of one worker.
#[derive(Debug)]
pub struct Polling {
    longest: Duration,
    window: Duration,
}

impl Polling {
    /// Polls for at most `longest`; zero disables polling.
    pub fn new(longest: Duration) -> Self {
        Self {
            longest,
            window: longest,
        }
    }

    /// Time to poll now.
    pub fn window(&self) -> Duration {
        self.window
    }

    /// Records that a request came within the window.
    pub fn found(&mut self) {
        self.window = self.longest;
    }

    /// Records that no request came within the window.
    pub fn missed(&mut self) {
        self.window /= 2;
        if self.window < LEAST {
            self.window = Duration::ZERO;
        }
    }

    /// Calls `sleep`, which sleeps. A sleep shorter than the longest window resets the window.
    pub fn sleep<T>(&mut self, sleep: impl FnOnce() -> T) -> T {
        if self.longest.is_zero() {
            return sleep();
        }
        let start = Instant::now();
        let result = sleep();
        if start.elapsed() < self.longest {
            self.window = self.longest;
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_shrinks_to_nothing_and_comes_back() {
        let mut polling = Polling::new(Duration::from_micros(50));
        for _ in 0..10 {
            polling.missed();
        }
        assert_eq!(polling.window(), Duration::ZERO);
        polling.found();
        assert_eq!(polling.window(), Duration::from_micros(50));
        let mut never = Polling::new(Duration::ZERO);
        assert_eq!(never.sleep(|| 7), 7);
        assert_eq!(never.window(), Duration::ZERO);
    }
}
