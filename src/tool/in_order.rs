//! Jobs done on many threads, their results taken in the order in which the jobs were given.
//!
//! The giver of jobs is the taker of results: once enough jobs are under way, each
//! [`InOrder::push`] first takes the oldest result. So memory is bounded by the number of jobs
//! under way, and what is made of the results does not depend on the number of threads.

use std::collections::VecDeque;
use std::io;
use std::num::NonZero;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, Scope};

use super::Error;

/// Jobs under way for each thread: one in work, and some waiting so that no thread ever waits.
const JOBS_PER_THREAD: usize = 4;

/// Jobs under way besides: where all processors are busy with jobs, their giver waits for one.
const MORE_JOBS: usize = 8;

/// Threads at work on jobs `J`, which become `D` when done.
pub struct InOrder<J, D> {
    jobs: Sender<(J, SyncSender<D>)>,
    under_way: VecDeque<Receiver<D>>,
    most: usize,
}

impl<J: Send, D: Send> InOrder<J, D> {
    /// Starts threads, each with a worker of its own. They end when this value is dropped.
    ///
    /// # Errors
    /// Not a single thread could be started.
    pub fn start<'scope, W>(
        scope: &'scope Scope<'scope, '_>,
        threads: NonZero<usize>,
        worker: impl Fn() -> W,
    ) -> Result<Self, Error>
    where
        W: FnMut(J) -> D + Send + 'scope,
        J: 'scope,
        D: 'scope,
    {
        let (jobs, queue) = channel::<(J, SyncSender<D>)>();
        let queue = Arc::new(Mutex::new(queue));
        for number in 0..threads.get() {
            let queue = Arc::clone(&queue);
            let mut work = worker();
            let run = move || {
                loop {
                    // The lock is given back before the work starts.
                    let next = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok((job, done)) = next else { return };
                    // If the giver of jobs failed, no thread waits for the result.
                    let _ = done.send(work(job));
                }
            };
            match Builder::new().spawn_scoped(scope, run) {
                Ok(_) => {}
                Err(error) if number == 0 => return Err(Error::Threads(error)),
                // Fewer threads than wanted are only slower.
                Err(_) => break,
            }
        }
        Ok(Self {
            jobs,
            under_way: VecDeque::new(),
            most: threads.get() * JOBS_PER_THREAD + MORE_JOBS,
        })
    }

    /// Gives a job, and takes the oldest result if enough jobs are under way.
    ///
    /// # Errors
    /// The threads died.
    pub fn push(&mut self, job: J) -> Result<Option<D>, Error> {
        let oldest = if self.under_way.len() >= self.most {
            self.pop()?
        } else {
            None
        };
        let (done, result) = sync_channel(1);
        self.jobs.send((job, done)).map_err(|_| died())?;
        self.under_way.push_back(result);
        Ok(oldest)
    }

    /// Takes the oldest result, waiting for it; `None` when no job is under way.
    ///
    /// # Errors
    /// The threads died.
    pub fn pop(&mut self) -> Result<Option<D>, Error> {
        let oldest = self.under_way.pop_front();
        oldest
            .map(|result| result.recv().map_err(|_| died()))
            .transpose()
    }
}

fn died() -> Error {
    Error::Threads(io::Error::other("a thread ended early"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_order_and_few_are_kept() {
        for threads in [1, 2, 7] {
            let threads = NonZero::new(threads).unwrap();
            std::thread::scope(|scope| {
                let square = || |n: u64| n * n;
                let mut pool = InOrder::start(scope, threads, square).unwrap();
                let mut results = Vec::new();
                for n in 0..1000 {
                    results.extend(pool.push(n).unwrap());
                    assert!(pool.under_way.len() <= 4 * threads.get() + 8);
                }
                while let Some(result) = pool.pop().unwrap() {
                    results.push(result);
                }
                assert!(results.iter().copied().eq((0..1000).map(|n| n * n)));
            });
        }
    }
}
