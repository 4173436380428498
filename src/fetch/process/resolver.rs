//! Resolves references to images, some at a time.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crate::cache::Cache;
use crate::fetch::image_lookup;
use crate::registry::client::Client;

/// Images that are resolved at a time; more wait.
const MAX_AT_A_TIME: usize = 32;

/// How long the owner may take to read an answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// An image to find.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) reference: String,
    /// Longest wait for a registry that does not answer.
    pub(super) patience: Duration,
    /// Where the answer is written to.
    pub(super) answer: UnixStream,
}

#[derive(Debug, Default)]
struct Queue {
    threads: usize,
    waiting: VecDeque<Job>,
}

/// Finds the layers of images.
#[derive(Debug)]
pub(super) struct Resolver {
    cache: Cache,
    client: Arc<Client>,
    queue: Mutex<Queue>,
}

impl Resolver {
    pub(super) fn new(cache: Cache, client: Arc<Client>) -> Arc<Self> {
        let queue = Mutex::default();
        Arc::new(Self {
            cache,
            client,
            queue,
        })
    }

    /// Finds an image and answers, on another thread.
    ///
    /// # Errors
    /// The process has no thread left.
    pub(super) fn resolve(self: &Arc<Self>, job: Job) -> io::Result<()> {
        let mut queue = self.queue();
        queue.waiting.push_back(job);
        if queue.threads >= MAX_AT_A_TIME {
            return Ok(());
        }
        let own = Arc::clone(self);
        let thread = thread::Builder::new().name("fetch-resolve".to_owned());
        let started = thread.spawn(move || own.run());
        match started {
            Ok(_) => queue.threads += 1,
            // Another thread takes the job.
            Err(_) if queue.threads > 0 => {}
            Err(error) => {
                queue.waiting.pop_back();
                return Err(error);
            }
        }
        Ok(())
    }

    fn run(&self) {
        while let Some(job) = self.next() {
            let Job {
                reference,
                patience,
                mut answer,
            } = job;
            let found = image_lookup::find(&self.cache, &self.client, &reference, patience);
            let written = answer
                .set_write_timeout(Some(PATIENCE))
                .and_then(|()| answer.write_all(&serde_json::to_vec(&found)?))
                // The keeper holds the socket open for the next fetcher.
                .and_then(|()| answer.shutdown(Shutdown::Write));
            if let Err(error) = written {
                log::debug!("an owner does not read the layers of an image: {error}");
            }
        }
    }

    /// The next job; without one, the thread ends.
    fn next(&self) -> Option<Job> {
        let mut queue = self.queue();
        let job = queue.waiting.pop_front();
        if job.is_none() {
            queue.threads -= 1;
        }
        job
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
