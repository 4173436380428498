//! Sizes of requests: small on a slow link, large over a long one.
//!
//! The time of an answer is a round trip and a transfer. Asking for as much as the link carries in
//! a round trip doubles that time at most, and halves the number of round trips of a reader that
//! goes on from there.
//!
//! A sequential reader needs as much on its way as keeps the link full: a few round trips, and a
//! moment in which the reader does something else. More is no faster, and lost if the reader stops.

use std::time::Duration;

use crate::format::presence::UNIT;

const MIN: u64 = UNIT;
const MAX: u64 = 1 << 20;
const START: u64 = 256 << 10;

/// Longest window of a sequential reader, in bytes, and its shortest limit.
const LONGEST_WINDOW: u64 = 32 << 20;
const SHORTEST_WINDOW: u64 = 512 << 10;

/// Round trips, and seconds besides, that the window of a sequential reader covers.
const WINDOW_ROUND_TRIPS: f64 = 4.0;
const WINDOW_SECONDS: f64 = 0.25;

/// Weight of the newest measurement.
const WEIGHT: f64 = 0.25;

/// How much of the best measurement is forgotten with each answer.
const FORGET: f64 = 0.02;

/// Measurements of the link to one origin.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    /// Bytes to ask for as long as nothing is known.
    start: u64,
    /// Seconds to the first byte.
    delay: Option<f64>,
    /// Bytes a second after it.
    rate: Option<f64>,
    /// The shortest delay lately: answers that wait for others on the same link have a longer one.
    shortest_delay: Option<f64>,
    /// The highest rate lately: answers that share the link with others have a lower one.
    highest_rate: Option<f64>,
}

impl Default for Pace {
    fn default() -> Self {
        Self::starting_with(START)
    }
}

impl Pace {
    /// Asks for so many bytes at first.
    pub(super) fn starting_with(start: u64) -> Self {
        Self {
            start: start.clamp(MIN, MAX),
            delay: None,
            rate: None,
            shortest_delay: None,
            highest_rate: None,
        }
    }

    /// Takes the measurements of one answer.
    pub(super) fn observe(&mut self, first_byte: Duration, bytes: u64, transfer: Duration) {
        let mix = |old: Option<f64>, new: f64| old.map_or(new, |old| old + WEIGHT * (new - old));
        let delay = first_byte.as_secs_f64();
        self.delay = Some(mix(self.delay, delay));
        let forgotten = self.shortest_delay.map(|old| old * (1.0 + FORGET));
        self.shortest_delay = Some(forgotten.map_or(delay, |old| old.min(delay)));
        // What came with the first packet says nothing of the rate.
        if bytes > UNIT {
            let seconds = transfer.as_secs_f64().max(1e-6);
            let rate = bytes as f64 / seconds;
            self.rate = Some(mix(self.rate, rate));
            let forgotten = self.highest_rate.map(|old| old * (1.0 - FORGET));
            self.highest_rate = Some(forgotten.map_or(rate, |old| old.max(rate)));
        }
    }

    /// Units to ask for when a reader waits for one.
    pub(super) fn demand_units(&self) -> u64 {
        let bytes = match (self.delay, self.rate) {
            (Some(delay), Some(rate)) => ((delay * rate) as u64).clamp(MIN, MAX),
            _ => self.start,
        };
        1 << (bytes / UNIT).max(1).ilog2()
    }

    /// Most units to read ahead of a sequential reader.
    pub(super) fn window_units(&self) -> u64 {
        let bytes = match (self.shortest_delay, self.highest_rate) {
            (Some(delay), Some(rate)) => {
                let seconds = WINDOW_ROUND_TRIPS * delay + WINDOW_SECONDS;
                ((rate * seconds) as u64).clamp(SHORTEST_WINDOW, LONGEST_WINDOW)
            }
            _ => LONGEST_WINDOW,
        };
        bytes / UNIT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Measurements of many answers over a link of this round trip and rate.
    fn measured(milliseconds: f64, bytes_per_second: f64) -> Pace {
        let mut pace = Pace::default();
        for _ in 0..50 {
            let bytes = pace.demand_units() * UNIT;
            let transfer = Duration::from_secs_f64(bytes as f64 / bytes_per_second);
            pace.observe(
                Duration::from_secs_f64(milliseconds / 1000.0),
                bytes,
                transfer,
            );
        }
        pace
    }

    /// Units asked for over such a link.
    fn settled(milliseconds: f64, bytes_per_second: f64) -> u64 {
        measured(milliseconds, bytes_per_second).demand_units()
    }

    #[test]
    fn the_size_follows_round_trip_and_rate() {
        assert_eq!(Pace::default().demand_units(), 4);
        assert_eq!(Pace::starting_with(4096).demand_units(), 1);
        assert_eq!(Pace::starting_with(1 << 19).demand_units(), 8);
        assert_eq!(Pace::starting_with(64 << 20).demand_units(), 16);
        assert_eq!(settled(0.1, 1e9), 1);
        assert_eq!(settled(1.0, 125e6), 1);
        assert_eq!(settled(20.0, 125e6), 16);
        assert_eq!(settled(200.0, 125e6), 16);
        assert_eq!(settled(20.0, 3e6), 1);
    }

    #[test]
    fn the_window_is_what_fills_the_link() {
        let window = |milliseconds, rate| measured(milliseconds, rate).window_units() * UNIT;
        assert_eq!(Pace::default().window_units() * UNIT, LONGEST_WINDOW);
        // 100 Mbit/s: 3.1 MB in the quarter of a second, and 4 round trips.
        assert!((3_000_000..3_300_000).contains(&window(1.0, 12.5e6)));
        assert!((3_900_000..4_200_000).contains(&window(20.0, 12.5e6)));
        assert_eq!(window(100.0, 125e6), LONGEST_WINDOW);
        assert_eq!(window(20.0, 100e3), SHORTEST_WINDOW);
    }

    #[test]
    fn answers_that_share_the_link_do_not_make_it_slow() {
        let mut pace = measured(20.0, 125e6);
        let before = pace.window_units();
        for _ in 0..8 {
            pace.observe(
                Duration::from_millis(160),
                1 << 20,
                Duration::from_millis(64),
            );
        }
        assert!(pace.window_units() >= before * 3 / 4);
    }

    #[test]
    fn absurd_measurements_do_no_harm() {
        for (delay, transfer) in [
            (Duration::ZERO, Duration::ZERO),
            (Duration::MAX, Duration::MAX),
        ] {
            let mut pace = Pace::default();
            pace.observe(delay, u64::MAX, transfer);
            assert!((1..=16).contains(&pace.demand_units()));
            assert!((8..=512).contains(&pace.window_units()));
        }
    }
}
