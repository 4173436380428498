//! Number of processors.

use std::num::NonZero;
use std::sync::OnceLock;
use std::thread;

/// Returns the number of processors that this process may use. Determines it once: that reads files of the control
/// group, which takes a while and which the sandbox forbids later.
pub fn available() -> usize {
    static NUMBER: OnceLock<usize> = OnceLock::new();
    *NUMBER.get_or_init(|| thread::available_parallelism().map_or(1, NonZero::get))
}
