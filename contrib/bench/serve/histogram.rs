//! Times in buckets three per cent wide.

/// Buckets for each doubling.
const STEPS: u64 = 32;

/// Nanoseconds, counted.
#[derive(Clone, Default)]
pub struct Histogram {
    counts: Vec<u64>,
}

impl Histogram {
    /// Counts one time.
    pub fn record(&mut self, nanoseconds: u64) {
        let value = nanoseconds.max(STEPS);
        let shift = value.ilog2() - STEPS.ilog2();
        let bucket = (u64::from(shift) * STEPS + (value >> shift) % STEPS) as usize;
        if self.counts.len() <= bucket {
            self.counts.resize(bucket + 1, 0);
        }
        self.counts[bucket] += 1;
    }

    /// Adds the times of another.
    pub fn add(&mut self, other: &Self) {
        self.counts
            .resize(self.counts.len().max(other.counts.len()), 0);
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
    }

    /// Microseconds that `part` of the times do not exceed; zero if there are none.
    pub fn quantile(&self, part: f64) -> f64 {
        let total: u64 = self.counts.iter().sum();
        let mut left = (total as f64 * part) as u64;
        for (bucket, count) in (0..).zip(&self.counts) {
            if left < *count {
                return ((STEPS + bucket % STEPS) << (bucket / STEPS)) as f64 / 1000.0;
            }
            left -= count;
        }
        0.0
    }
}
