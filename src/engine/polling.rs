//! Busy-polling of the available ring before a worker sleeps.
//!
//! A sleep costs the guest a kick and the worker a wake-up; polling costs processor time. The window
//! adapts: it is full after work came within it, and is halved each time none did.

use std::time::{Duration, Instant};

/// A shorter window is set to zero.
const LEAST: Duration = Duration::from_micros(1);

/// The polling window of one worker.
#[derive(Debug)]
pub struct Polling {
    longest: Duration,
    window: Duration,
}

impl Polling {
    /// Polls for at most `longest`; zero: never.
    pub fn new(longest: Duration) -> Self {
        Self {
            longest,
            window: longest,
        }
    }

    /// How long to poll now.
    pub fn window(&self) -> Duration {
        self.window
    }

    /// Work came within the window.
    pub fn found(&mut self) {
        self.window = self.longest;
    }

    /// Nothing came within the window.
    pub fn missed(&mut self) {
        self.window /= 2;
        if self.window < LEAST {
            self.window = Duration::ZERO;
        }
    }

    /// Sleeps by calling `sleep`; a short sleep opens the window again.
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
