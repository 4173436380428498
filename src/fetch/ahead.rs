//! Read-ahead: finds readers that go through a blob in order, and says what they will want next.

use crate::format::presence::{UNIT, UnitRange};

/// Readers of one blob that are followed at a time.
const STREAMS: usize = 8;

/// First window of a reader, in units.
const FIRST: u64 = (512 << 10) / UNIT;

/// Units between a reader and one that is near it.
const NEAR: u64 = (256 << 10) / UNIT;

#[derive(Clone, Copy, Debug)]
struct Stream {
    /// Unit behind the last one that was wanted.
    next: u64,
    /// Unit behind the last one that was read ahead.
    ahead: u64,
    window: u64,
}

/// The sequential readers of one blob, the latest last.
#[derive(Clone, Debug, Default)]
pub(super) struct Ahead {
    streams: Vec<Stream>,
}

impl Ahead {
    /// Whether a reader was near these units: then it probably wants more there. A reader at random
    /// does not, and would pay for bytes that it does not use.
    pub(super) fn is_near(&self, units: UnitRange) -> bool {
        let mut streams = self.streams.iter();
        streams.any(|stream| units.start().abs_diff(stream.next) <= NEAR)
    }

    /// Takes the units that a reader waits for, and returns those of the blob's `all` units to read
    /// ahead of it: none at its first step, then a window that doubles with each further one, up to
    /// `longest`.
    pub(super) fn wanted(&mut self, units: UnitRange, all: u64, longest: u64) -> UnitRange {
        let follows = |stream: &Stream| {
            // Anywhere in its window: it met units that are still on their way.
            units.start() + 1 >= stream.next && units.start() <= stream.ahead.max(stream.next)
        };
        let Some(at) = self.streams.iter().position(follows) else {
            if self.streams.len() == STREAMS {
                self.streams.remove(0);
            }
            self.streams.push(Stream {
                next: units.end(),
                ahead: units.end(),
                window: FIRST,
            });
            return UnitRange::default();
        };
        let mut stream = self.streams.remove(at);
        stream.next = stream.next.max(units.end());
        let start = stream.ahead.max(units.end());
        let window = stream.window.min(longest);
        let end = units.end().saturating_add(window).min(all);
        // In large steps: a request for each unit the reader moves on would be a request each.
        let range = match end.saturating_sub(start) >= window / 2 || end == all {
            true => UnitRange::new(start, end),
            false => UnitRange::new(start, start),
        };
        stream.ahead = range.end();
        if !range.is_empty() {
            stream.window = (window * 2).min(longest);
        }
        self.streams.push(stream);
        range
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u64 = 100_000;
    const LONGEST: u64 = 512;

    #[test]
    fn the_window_of_a_sequential_reader_doubles() {
        let mut ahead = Ahead::default();
        assert!(
            ahead
                .wanted(UnitRange::new(100, 101), ALL, LONGEST)
                .is_empty()
        );
        assert_eq!(
            ahead.wanted(UnitRange::new(101, 102), ALL, LONGEST),
            UnitRange::new(102, 110)
        );
        // The reader arrives at the end of what was read ahead.
        assert_eq!(
            ahead.wanted(UnitRange::new(110, 111), ALL, LONGEST),
            UnitRange::new(111, 127)
        );
        assert_eq!(
            ahead.wanted(UnitRange::new(127, 128), ALL, LONGEST),
            UnitRange::new(128, 160)
        );
        let mut at = 160;
        for _ in 0..10 {
            at = ahead.wanted(UnitRange::one(at), ALL, LONGEST).end();
        }
        assert_eq!(
            ahead.wanted(UnitRange::one(at), ALL, LONGEST),
            UnitRange::new(at + 1, at + 1 + LONGEST)
        );
    }

    #[test]
    fn a_reader_in_its_window_keeps_it_filled_in_large_steps() {
        let mut ahead = Ahead::default();
        ahead.wanted(UnitRange::new(0, 1), ALL, LONGEST);
        assert_eq!(
            ahead.wanted(UnitRange::new(1, 2), ALL, LONGEST),
            UnitRange::new(2, 10)
        );
        let mut requests = 0;
        for unit in 2..1000 {
            requests += u32::from(!ahead.wanted(UnitRange::one(unit), ALL, LONGEST).is_empty());
        }
        assert!(requests < 20, "{requests}");
    }

    #[test]
    fn a_reader_is_near_where_it_just_was() {
        let mut ahead = Ahead::default();
        let units = |start| UnitRange::new(start, start + 1);
        assert!(!ahead.is_near(units(100)));
        ahead.wanted(units(100), ALL, LONGEST);
        let near = (0..ALL).filter(|unit| ahead.is_near(units(*unit)));
        assert_eq!(near.collect::<Vec<_>>(), (97..=105).collect::<Vec<_>>());
    }

    #[test]
    fn random_readers_get_nothing_and_several_streams_are_told_apart() {
        let mut ahead = Ahead::default();
        for unit in [5, 1000, 300, 7, 20_000, 40] {
            assert!(
                ahead.wanted(UnitRange::one(unit), ALL, LONGEST).is_empty(),
                "{unit}"
            );
        }
        let mut ahead = Ahead::default();
        ahead.wanted(UnitRange::new(0, 1), ALL, LONGEST);
        ahead.wanted(UnitRange::new(5000, 5001), ALL, LONGEST);
        assert_eq!(
            ahead.wanted(UnitRange::new(1, 2), ALL, LONGEST),
            UnitRange::new(2, 10)
        );
        assert_eq!(
            ahead.wanted(UnitRange::new(5001, 5002), ALL, LONGEST),
            UnitRange::new(5002, 5010)
        );
    }

    #[test]
    fn nothing_is_read_past_the_end() {
        let mut ahead = Ahead::default();
        ahead.wanted(UnitRange::new(0, 1), 5, LONGEST);
        assert_eq!(
            ahead.wanted(UnitRange::new(1, 2), 5, LONGEST),
            UnitRange::new(2, 5)
        );
        assert!(ahead.wanted(UnitRange::new(4, 5), 5, LONGEST).is_empty());
    }
}
