//! Logging that a guest cannot flood.

use std::time::{Duration, Instant};

/// Lets one message through per second and counts the rest.
#[derive(Debug, Default)]
pub struct LogLimit {
    last: Option<Instant>,
    suppressed: u64,
}

impl LogLimit {
    const PERIOD: Duration = Duration::from_secs(1);

    /// Logs `message` as a warning, unless one was logged less than a second ago.
    pub fn warn(&mut self, message: std::fmt::Arguments<'_>) {
        let now = Instant::now();
        if self
            .last
            .is_some_and(|last| now.duration_since(last) < Self::PERIOD)
        {
            self.suppressed += 1;
            return;
        }
        match self.suppressed {
            0 => log::warn!("{message}"),
            more => log::warn!("{message} (and {more} more before it)"),
        }
        (self.last, self.suppressed) = (Some(now), 0);
    }
}
