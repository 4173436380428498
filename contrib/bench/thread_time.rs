//! Processor time of this thread as what `criterion` measures: on a busy machine the clock on the wall
//! tells more of the others.

use criterion::measurement::{Measurement, ValueFormatter, WallTime};
use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds this thread ran.
pub struct ThreadTime;

fn ran() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 * 1e9 + time.tv_nsec as f64
}

impl Measurement for ThreadTime {
    type Intermediate = f64;
    type Value = f64;

    fn start(&self) -> f64 {
        ran()
    }

    fn end(&self, start: f64) -> f64 {
        ran() - start
    }

    fn add(&self, one: &f64, other: &f64) -> f64 {
        one + other
    }

    fn zero(&self) -> f64 {
        0.0
    }

    fn to_f64(&self, value: &f64) -> f64 {
        *value
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        WallTime.formatter()
    }
}
