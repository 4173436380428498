//! A disk process's side of the connection to the fetcher.
//!
//! ```text
//! queue worker: request(blob, range, waker, ticket) --> table of pending fetches --> link --> fetcher
//!       ^                                                    |                                  |
//!       '------ waker.finish(ticket, outcome) <--- client thread <----------- Ready | Failed ---'
//! ```
//! Asking never waits. The fetcher may die at any time: its successor says hello on the same
//! socket, and the client repeats all that was not answered.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use super::counts::Counts;
use super::link::{Link, Message, Turn};
use super::opened::Opened;
use super::openings::{Openings, Reopen};
use super::protocol::{Cause, MAX_FETCH, Reply, Request, Subject};
use super::refetch::RejectedUnits;
use super::waker::{FetchError, FetchErrorKind, Ticket, Waker};
use crate::format::presence::UnitRange;
use crate::ratelimited_log;

/// How often deadlines are looked at.
const TICK: Duration = Duration::from_millis(200);

/// A wait without a deadline: 30 days.
const ENDLESS: Duration = Duration::from_secs(30 * 24 * 3600);

/// Limits of the classes in which waits are counted.
pub const WAITS: [Duration; 8] = [
    Duration::from_millis(1),
    Duration::from_millis(5),
    Duration::from_millis(20),
    Duration::from_millis(100),
    Duration::from_millis(500),
    Duration::from_millis(2_500),
    Duration::from_secs(10),
    Duration::from_secs(60),
];

/// Deadlines of waits for bytes.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// While layers are opened.
    pub start: Duration,
    /// For a read of the open disk; `None`: as long as it takes.
    pub serving: Option<Duration>,
}

impl Default for Patience {
    /// A minute to open, no limit for a guest.
    fn default() -> Self {
        Self {
            start: Duration::from_secs(60),
            serving: None,
        }
    }
}

/// Units that are fetched because they were damaged, and where that is noted.
pub(super) type Repair = (Arc<RejectedUnits>, UnitRange);

/// A fetch that was not answered.
#[derive(Debug)]
struct Pending {
    request: Request,
    waker: Arc<Waker>,
    ticket: Ticket,
    deadline: Instant,
    repair: Option<Repair>,
    started: Instant,
}

#[derive(Debug, Default)]
struct Table {
    next: u64,
    fetches: HashMap<u64, Pending>,
    openings: Openings,
    counts: Option<Counts>,
    gone: bool,
}

/// Reader of an open disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum User {
    /// A guest, which an I/O error would damage.
    Guest,
    /// A program that reports errors.
    Tool,
}

impl Table {
    /// Adds a request, which has the next number as its ticket.
    fn add(
        &mut self,
        request: Request,
        waker: &Arc<Waker>,
        ticket: Ticket,
        patience: Duration,
        repair: Option<Repair>,
    ) {
        let pending = Pending {
            request,
            waker: Arc::clone(waker),
            ticket,
            deadline: Instant::now() + patience,
            repair,
            started: Instant::now(),
        };
        self.fetches.insert(self.next, pending);
        self.next += 1;
    }
}

#[derive(Debug)]
struct Shared {
    link: Link,
    table: Mutex<Table>,
    opened: Condvar,
    /// Unset while the layers are opened.
    user: OnceLock<User>,
    patience: Patience,
    /// Fetches by the time they took, as [`WAITS`] divides it.
    waits: [AtomicU64; WAITS.len() + 1],
}

/// The connection to a fetcher.
#[derive(Debug)]
pub struct Client {
    shared: Arc<Shared>,
}

impl Client {
    /// Starts the thread that receives answers on `socket`. The thread calls `prepare` first, to drop its
    /// privileges for example. The connection ends when the client is dropped.
    ///
    /// # Errors
    /// The process has no descriptor or no thread left.
    pub fn start(
        socket: OwnedFd,
        patience: Patience,
        prepare: impl FnOnce() + Send + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            link: Link::new(socket)?,
            table: Mutex::default(),
            opened: Condvar::new(),
            user: OnceLock::new(),
            patience,
            waits: Default::default(),
        });
        let weak = Arc::downgrade(&shared);
        thread::Builder::new()
            .name("fetch-client".to_owned())
            .spawn(move || {
                prepare();
                receive(&weak);
            })?;
        Ok(Self { shared })
    }

    /// From now on a definite refusal no longer ends a wait: a guest depends on the bytes.
    pub fn start_serving(&self) {
        let _ = self.shared.user.set(User::Guest);
    }

    /// The layers are open, and a tool reads them. The fetcher reads ahead from now on. A definite
    /// refusal still ends a wait.
    pub fn start_reading(&self) {
        let _ = self.shared.user.set(User::Tool);
    }

    /// How long a reader without anything else to do should wait for bytes.
    pub fn patience(&self) -> Duration {
        let Patience { start, serving } = self.shared.patience;
        match self.shared.user.get() {
            Some(_) => serving.unwrap_or(ENDLESS),
            None => start,
        }
    }

    /// Asks for the descriptors of a blob and waits for them. Each blob is opened once.
    ///
    /// # Errors
    /// A [`FetchError`] with the fetcher's reason, or [`FetchErrorKind::Timeout`].
    pub fn open(&self, blob: u32) -> Result<Opened, FetchError> {
        let deadline = Instant::now() + self.patience();
        let mut table = self.shared.table();
        table.openings.ask(blob);
        self.shared.send(&Request::Open { blob });
        loop {
            if let Some(done) = table.openings.take(blob) {
                return done;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if table.gone {
                return Err(gone());
            }
            if left.is_zero() {
                table.openings.give_up(blob);
                let reason = "the fetcher did not open the blob in time";
                return Err(FetchError::new(FetchErrorKind::Timeout, reason));
            }
            let waited = self.shared.opened.wait_timeout(table, left);
            table = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Lets `open`, which was made of the descriptors that [`Client::open`] returned, take those that a fetcher
    /// sends later.
    pub(super) fn register(&self, blob: u32, open: &Arc<impl Reopen + 'static>) {
        let weak = Arc::downgrade(open);
        let later = self.shared.table().openings.register(blob, weak);
        if let Some(later) = later {
            open.reopen(later);
        }
    }

    /// Asks for bytes. `waker` gets `ticket` once. Never waits.
    pub(super) fn request(
        &self,
        blob: u32,
        bytes: Range<u64>,
        waker: &Arc<Waker>,
        ticket: Ticket,
        repair: Option<Repair>,
    ) {
        let cause = match (&repair, self.shared.user.get()) {
            (Some(_), Some(User::Guest)) => Cause::Repair,
            (Some(_), _) => Cause::RepairRead,
            (None, Some(User::Guest)) => Cause::Demand,
            (None, Some(User::Tool)) => Cause::Read,
            (None, None) => Cause::Start,
        };
        let mut table = self.shared.table();
        let refused = match table.gone && !self.shared.is_serving() {
            true => Some(gone()),
            false if bytes.end - bytes.start > MAX_FETCH => {
                let reason = "the read has more bytes than one fetch may have";
                Some(FetchError::new(FetchErrorKind::System, reason))
            }
            false => None,
        };
        if let Some(error) = refused {
            drop(table);
            return waker.finish(ticket, Err(error));
        }
        let request = Request::Fetch {
            ticket: table.next,
            blob,
            offset: bytes.start,
            len: bytes.end - bytes.start,
            cause,
        };
        table.add(request, waker, ticket, self.patience(), repair);
        if !table.gone {
            self.shared.send(&request);
        }
    }

    /// Lets the fetcher fetch all of a blob and compare it with its digest, and waits for that: as
    /// long as bytes come. Open the blob afterwards.
    ///
    /// # Errors
    /// A [`FetchError`] with the fetcher's reason.
    pub fn fill(&self, blob: u32) -> Result<(), FetchError> {
        let waker = Waker::new();
        let waker =
            waker.map_err(|error| FetchError::new(FetchErrorKind::System, error.to_string()))?;
        let mut table = self.shared.table();
        if table.gone {
            return Err(gone());
        }
        let request = Request::Fill {
            ticket: table.next,
            blob,
        };
        table.add(request, &waker, Ticket(0), ENDLESS, None);
        self.shared.send(&request);
        drop(table);
        waker.wait()
    }

    /// Suggests to fetch bytes that will be wanted soon. Never waits, and is not answered.
    pub fn suggest(&self, blob: u32, bytes: Range<u64>, cause: Cause) {
        self.shared.send(&Request::Fetch {
            ticket: u64::MAX,
            blob,
            offset: bytes.start,
            len: (bytes.end - bytes.start).min(MAX_FETCH),
            cause,
        });
    }

    /// The fetcher's counters since its start; `None` if it does not answer in time.
    pub fn counts(&self, patience: Duration) -> Option<Counts> {
        let deadline = Instant::now() + patience;
        let mut table = self.shared.table();
        table.counts = None;
        self.shared.send(&Request::Count);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if table.counts.is_some() || table.gone || left.is_zero() {
                return table.counts;
            }
            let waited = self.shared.opened.wait_timeout(table, left);
            table = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Fetches of this disk by the time they took: for each limit of [`WAITS`], those that took less
    /// and not less than the one before; last those that took longer.
    pub fn waits(&self) -> [u64; WAITS.len() + 1] {
        let waits = &self.shared.waits;
        std::array::from_fn(|at| waits[at].load(Ordering::Relaxed))
    }

    /// Number of fetches that were not answered.
    pub fn waiting(&self) -> usize {
        self.shared.table().fetches.len()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.shared.link.end();
    }
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_serving(&self) -> bool {
        self.user.get() == Some(&User::Guest)
    }

    fn send(&self, request: &Request) {
        self.link.send(request.encode(), Vec::new());
    }

    fn answer(&self, message: Message) {
        let reply = match Reply::decode(&message.bytes) {
            Ok(reply) => reply,
            Err(error) => {
                log::debug!("ignored a message of the fetcher: {error}");
                return;
            }
        };
        match reply {
            Reply::Hello => self.repeat(),
            Reply::Opened {
                blob,
                len,
                complete,
            } => self.opened(blob, Opened::new(len, complete, message.files)),
            Reply::Ready { ticket } => self.finish(ticket, Ok(())),
            Reply::Counts(counts) => {
                self.table().counts = Some(counts);
                self.opened.notify_all();
            }
            Reply::Failed {
                subject,
                kind,
                reason,
            } => {
                let error = FetchError::new(kind, reason);
                match subject {
                    Subject::Blob(blob) => self.opened(blob, Err(error)),
                    Subject::Ticket(ticket) => self.finish(ticket, Err(error)),
                }
            }
        }
    }

    fn repeat(&self) {
        let table = self.table();
        for blob in table.openings.asked() {
            self.send(&Request::Open { blob });
        }
        for pending in table.fetches.values() {
            self.send(&pending.request);
        }
    }

    fn opened(&self, blob: u32, result: Result<Opened, FetchError>) {
        let taken = self.table().openings.answered(blob, result);
        self.opened.notify_all();
        // Without the table's lock: this maps a file.
        if let Some((open, opened)) = taken {
            open.reopen(opened);
        }
    }

    fn finish(&self, ticket: u64, result: Result<(), FetchError>) {
        // Without the table's lock: a waker may belong to a thread that asks for more.
        let pending = self.table().fetches.remove(&ticket);
        if let Some(pending) = pending {
            let took = pending.started.elapsed();
            let class = WAITS.iter().position(|limit| took < *limit);
            self.waits[class.unwrap_or(WAITS.len())].fetch_add(1, Ordering::Relaxed);
            pending.finish(result);
        }
    }

    fn expire(&self) {
        let now = Instant::now();
        let mut table = self.table();
        let late = |pending: &Pending| pending.deadline <= now;
        let expired: Vec<_> = table
            .fetches
            .extract_if(|_, pending| late(pending))
            .collect();
        drop(table);
        for (_, pending) in expired {
            let reason = "the bytes did not arrive before the fetch deadline";
            pending.finish(Err(FetchError::new(FetchErrorKind::Timeout, reason)));
        }
    }

    /// Notes that the fetcher is gone for good. A guest's reads stay open until their deadline: the
    /// next daemon may answer them, while an error would damage the guest's file system.
    fn end(&self) {
        let mut table = self.table();
        table.gone = true;
        let fetches = match self.is_serving() {
            true => HashMap::new(),
            false => std::mem::take(&mut table.fetches),
        };
        drop(table);
        self.opened.notify_all();
        for pending in fetches.into_values() {
            pending.finish(Err(gone()));
        }
    }
}

impl Pending {
    fn finish(self, result: Result<(), FetchError>) {
        if let (Some((rejected, units)), Ok(())) = (self.repair, &result) {
            rejected.replaced(units);
        }
        self.waker.finish(self.ticket, result);
    }
}

fn receive(shared: &Weak<Shared>) {
    // The client's end is noticed at the next tick at the latest.
    while let Some(shared) = shared.upgrade() {
        let turn = shared.link.turn(TICK, |message| shared.answer(message));
        shared.expire();
        match turn {
            Ok(Turn::Open) => {}
            Ok(Turn::Ended) => break,
            Err(error) => {
                ratelimited_log::error(format_args!(
                    "the connection to the fetcher failed: {error}"
                ));
                break;
            }
        }
    }
    if let Some(shared) = shared.upgrade() {
        shared.end();
    }
    let mut reported = false;
    thread::sleep(TICK);
    while let Some(shared) = shared.upgrade() {
        shared.expire();
        if shared.is_serving() && !reported {
            ratelimited_log::error(format_args!(
                "the fetcher ended and is not replaced: reads of bytes that are not in the cache wait \
                 until the daemon is restarted"
            ));
            reported = true;
        }
        drop(shared);
        thread::sleep(TICK);
    }
}

fn gone() -> FetchError {
    FetchError::new(
        FetchErrorKind::System,
        "the fetcher and its keeper ended; restart this program",
    )
}
