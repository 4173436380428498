//! Runs tasks on many threads and returns their results in the order of the tasks.
//!
//! One caller adds tasks and takes results: once enough tasks are in progress, each [`InOrder::push`]
//! takes the oldest result first. This bounds memory, and makes the output independent of the
//! number of threads.

use std::collections::VecDeque;
use std::io;
use std::num::NonZero;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, Scope};

use super::Error;

/// Tasks in progress for each thread: one runs, the others wait, so that the thread never does.
const TASKS_PER_THREAD: usize = 4;

/// Additional tasks in progress, for a caller that is not scheduled while all processors are busy.
const MORE_TASKS: usize = 8;

/// Threads that turn tasks `T` into results `D`.
pub struct InOrder<T, D> {
    tasks: Sender<(T, SyncSender<D>)>,
    under_way: VecDeque<Receiver<D>>,
    most: usize,
    /// Whether this value was dropped.
    ended: Arc<AtomicBool>,
}

impl<T, D> Drop for InOrder<T, D> {
    /// Drops the tasks that have not begun: each may wait for storage or a registry that fails.
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
    }
}

impl<T: Send, D: Send> InOrder<T, D> {
    /// Starts threads, each with its own worker. They end when this value is dropped.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn start<'scope, W>(
        scope: &'scope Scope<'scope, '_>,
        threads: NonZero<usize>,
        worker: impl Fn() -> W,
    ) -> Result<Self, Error>
    where
        W: FnMut(T) -> D + Send + 'scope,
        T: 'scope,
        D: 'scope,
    {
        let (tasks, queue) = channel::<(T, SyncSender<D>)>();
        let queue = Arc::new(Mutex::new(queue));
        let ended = Arc::new(AtomicBool::new(false));
        for number in 0..threads.get() {
            let (queue, ended) = (Arc::clone(&queue), Arc::clone(&ended));
            let mut work = worker();
            let run = move || {
                loop {
                    // The lock is released before the work starts.
                    let next = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok((task, done)) = next else { return };
                    if ended.load(Ordering::Relaxed) {
                        return;
                    }
                    // If the caller failed, the result is not needed.
                    let _ = done.send(work(task));
                }
            };
            match Builder::new().spawn_scoped(scope, run) {
                Ok(_) => {}
                Err(error) if number == 0 => return Err(Error::Threads(error)),
                // Fewer threads than wanted are slower only.
                Err(_) => break,
            }
        }
        Ok(Self {
            tasks,
            under_way: VecDeque::new(),
            most: threads.get() * TASKS_PER_THREAD + MORE_TASKS,
            ended,
        })
    }

    /// Adds a task; takes the oldest result if enough tasks are in progress.
    ///
    /// # Errors
    /// The threads died.
    pub fn push(&mut self, task: T) -> Result<Option<D>, Error> {
        let oldest = if self.under_way.len() >= self.most {
            self.pop()?
        } else {
            None
        };
        let (done, result) = sync_channel(1);
        self.tasks.send((task, done)).map_err(|_| died())?;
        self.under_way.push_back(result);
        Ok(oldest)
    }

    /// Waits for the oldest result and takes it. `None`: no task is in progress.
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
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[test]
    fn jobs_that_have_not_begun_are_dropped_with_the_pool() {
        let (begun, ended) = (AtomicUsize::new(0), Mutex::new(()));
        std::thread::scope(|scope| {
            let holds_them_up = ended.lock().unwrap();
            let wait = || {
                |()| {
                    begun.fetch_add(1, Ordering::SeqCst);
                    drop(ended.lock());
                }
            };
            let mut pool = InOrder::start(scope, NonZero::<usize>::MIN, wait).unwrap();
            for _ in 0..5 {
                assert!(pool.push(()).unwrap().is_none());
            }
            while begun.load(Ordering::SeqCst) == 0 {
                std::thread::yield_now();
            }
            drop(pool);
            drop(holds_them_up);
        });
        assert_eq!(begun.into_inner(), 1);
    }

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
