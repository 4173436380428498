//! Answers of servers, counted by their status.

use std::sync::atomic::{AtomicU64, Ordering};

/// Classes of answers: 2xx, 3xx, 401 and 403, 404, 429, other 4xx, 5xx, none at all.
pub const CLASSES: usize = 8;

/// Running counts, shared by threads.
#[derive(Debug, Default)]
pub struct Statuses([AtomicU64; CLASSES]);

impl Statuses {
    /// Counts an answer by its status; `None` is a request without an answer.
    pub(super) fn count(&self, status: Option<u16>) {
        let class = match status {
            Some(200..300) => 0,
            Some(300..400) => 1,
            Some(401 | 403) => 2,
            Some(404) => 3,
            Some(429) => 4,
            Some(400..500) => 5,
            Some(_) => 6,
            None => 7,
        };
        self.0[class].fetch_add(1, Ordering::Relaxed);
    }

    /// The counts at this moment.
    pub fn snapshot(&self) -> [u64; CLASSES] {
        std::array::from_fn(|class| self.0[class].load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_answer_is_in_one_class() {
        let statuses = Statuses::default();
        for status in [200, 206, 307, 401, 403, 404, 429, 416, 503, 99, 600] {
            statuses.count(Some(status));
        }
        statuses.count(None);
        assert_eq!(statuses.snapshot(), [2, 1, 2, 1, 1, 1, 3, 1]);
    }
}
