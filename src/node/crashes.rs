//! Ends of a disk process in the last minute: when it is started again, and when it is given up.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Ends within [`WINDOW`] after which the process is not started again.
const MAX: usize = 5;
const WINDOW: Duration = Duration::from_secs(60);

/// Pause before the process is started again after its second end in the window: doubled with each further one. After
/// the first end there is none: a guest waits.
const PAUSE: Duration = Duration::from_millis(80);

/// The same after it could not be started for want of something that may come back; also after the first time.
const LONG_PAUSE: Duration = Duration::from_secs(1);

/// Ends of a process.
#[derive(Debug, Default)]
pub struct Crashes {
    ends: VecDeque<Instant>,
}

impl Crashes {
    /// Records an end at `now`. Returns the pause before the next start; `None` if the process is given up. `refused`
    /// says that the process was not even started, because a limit of the system was reached.
    pub fn add(&mut self, now: Instant, refused: bool) -> Option<Duration> {
        self.ends.push_back(now);
        while (self.ends.front()).is_some_and(|end| now.duration_since(*end) > WINDOW) {
            self.ends.pop_front();
        }
        let before = u32::try_from(self.ends.len() - 1).unwrap_or(u32::MAX);
        let pause = || match (refused, before) {
            (true, _) => LONG_PAUSE * 2u32.pow(before),
            (false, 0) => Duration::ZERO,
            (false, _) => PAUSE * 2u32.pow(before - 1),
        };
        (self.ends.len() < MAX).then(pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn five_ends_within_a_minute_are_too_many() {
        let mut crashes = Crashes::default();
        let start = Instant::now();
        for second in 0..100 {
            let now = start + Duration::from_secs(second * 20);
            assert!(crashes.add(now, false).is_some(), "every 20 s");
        }
        let mut crashes = Crashes::default();
        let pauses: Vec<_> = (0..5).map(|_| crashes.add(start, false)).collect();
        assert_eq!(pauses[0], Some(Duration::ZERO));
        assert_eq!(pauses[1], Some(Duration::from_millis(80)));
        assert!(pauses[..4].is_sorted() && pauses[4].is_none(), "{pauses:?}");
        let mut crashes = Crashes::default();
        assert_eq!(crashes.add(start, true), Some(Duration::from_secs(1)));
    }
}
