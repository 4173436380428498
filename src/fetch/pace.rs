//! Size of a demand request: small on a slow link, large over a long one.
//!
//! The time of an answer is a round trip and a transfer. Asking for as much as the link carries in
//! a round trip doubles that time at most, and halves the number of round trips of a reader that
//! goes on from there.

use std::time::Duration;

use crate::format::presence::UNIT;

const MIN: u64 = UNIT;
const MAX: u64 = 1 << 20;
const START: u64 = 256 << 10;

/// Weight of the newest measurement.
const WEIGHT: f64 = 0.25;

/// Measurements of the link to one origin.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    /// Bytes to ask for as long as nothing is known.
    start: u64,
    /// Seconds to the first byte.
    delay: Option<f64>,
    /// Bytes a second after it.
    rate: Option<f64>,
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
        }
    }

    /// Takes the measurements of one answer.
    pub(super) fn observe(&mut self, first_byte: Duration, bytes: u64, transfer: Duration) {
        let mix = |old: Option<f64>, new: f64| old.map_or(new, |old| old + WEIGHT * (new - old));
        self.delay = Some(mix(self.delay, first_byte.as_secs_f64()));
        // What came with the first packet says nothing of the rate.
        if bytes > UNIT {
            let seconds = transfer.as_secs_f64().max(1e-6);
            self.rate = Some(mix(self.rate, bytes as f64 / seconds));
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
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Units asked for after answers over a link of this round trip and rate.
    fn settled(milliseconds: f64, bytes_per_second: f64) -> u64 {
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
        pace.demand_units()
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
    fn absurd_measurements_do_no_harm() {
        for (delay, transfer) in [
            (Duration::ZERO, Duration::ZERO),
            (Duration::MAX, Duration::MAX),
        ] {
            let mut pace = Pace::default();
            pace.observe(delay, u64::MAX, transfer);
            assert!((1..=16).contains(&pace.demand_units()));
        }
    }
}
