//! Runs a list of jobs on a few threads.

use std::panic::resume_unwind;
use std::sync::{Mutex, PoisonError};
use std::thread;

use crate::io::processors;

/// Most threads.
const MAX_WORKERS: usize = 8;

/// Number of threads. Determined before the sandbox is entered, because that opens files.
#[derive(Clone, Copy, Debug)]
pub struct Workers(usize);

impl Workers {
    /// Only the caller's thread.
    pub const ONE: Self = Self(1);

    /// One thread for each core that this process may use, at most eight.
    pub fn available() -> Self {
        Self(processors::available().min(MAX_WORKERS))
    }
}

/// Calls `work` for each of `items` and returns the results in the same order. The caller's thread works
/// too: if no thread can be started, the jobs run one after the other.
pub fn each<T, R>(workers: Workers, items: Vec<T>, work: impl Fn(T) -> R + Sync) -> Vec<R>
where
    T: Send,
    R: Send,
{
    let workers = workers.0.min(items.len());
    let queue = Mutex::new(items.into_iter().enumerate());
    let run = || {
        let mut done = Vec::new();
        loop {
            // Released before the work starts.
            let next = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some((number, item)) = next else {
                return done;
            };
            done.push((number, work(item)));
        }
    };
    let mut done = thread::scope(|scope| {
        let helpers: Vec<_> = (1..workers)
            .map_while(|_| thread::Builder::new().spawn_scoped(scope, run).ok())
            .collect();
        let mut done = run();
        for helper in helpers {
            done.extend(helper.join().unwrap_or_else(|panic| resume_unwind(panic)));
        }
        done
    });
    done.sort_unstable_by_key(|(number, _)| *number);
    done.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_keep_the_order() {
        let squares = each(Workers::available(), (0..1000_u64).collect(), |n| n * n);
        assert!(
            squares
                .iter()
                .enumerate()
                .all(|(n, square)| *square == (n * n) as u64)
        );
        assert!(each(Workers::available(), Vec::<u8>::new(), |n| n).is_empty());
    }
}
