//! Fetching whole blobs: background download and `ovbd pull`.

#[cfg(test)]
mod tests;

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use thiserror::Error;

use super::blob::{Blob, Offer};
use super::dispatcher::Dispatcher;
use super::fair_queue::ClientId;
use super::origin::Failure;
use super::waiter::Waiter;
use crate::cache::{self, Partial, Publication};
use crate::format::digest::Digest;
use crate::format::presence::{UNIT, UnitRange};
use crate::reason::reason;
use crate::source::FetchErrorKind;
use crate::source::presence::Bitmap;
use crate::source::protocol::Cause;

/// How often progress is reported, and whether demand waits is looked at.
const TICK: Duration = Duration::from_millis(100);

/// How to fetch a whole blob.
#[derive(Clone, Copy, Debug)]
pub struct FillOptions {
    /// Requests under way at a time.
    pub parallel: usize,
    /// Bytes of one request.
    pub block_size: u64,
    /// Bytes a second, at most; `None`: as many as come.
    pub rate: Option<u64>,
    /// Give up if no byte comes for so long; `None`: never.
    pub patience: Option<Duration>,
    /// Whether to pause while the cache is over its limits.
    pub within_limits: bool,
}

impl FillOptions {
    /// As fast as the link is, for a client that waits for the whole blob.
    pub fn at_once() -> Self {
        Self {
            parallel: 4,
            block_size: 8 << 20,
            rate: None,
            patience: Some(Duration::from_secs(120)),
            within_limits: false,
        }
    }
}

/// A whole blob could not be fetched.
#[derive(Debug, Error)]
pub enum FillError {
    /// Bytes cannot be had.
    #[error("cannot fetch blob {digest}")]
    Fetch {
        /// The blob.
        digest: Digest,
        /// Why.
        source: Failure,
    },
    /// The cache cannot keep the blob.
    #[error("cannot complete blob {digest}")]
    Cache {
        /// The blob.
        digest: Digest,
        /// Why.
        source: Box<cache::Error>,
    },
    /// The blob was fetched twice and did not have its digest.
    #[error("blob {digest} was fetched twice; its bytes have digest {found}")]
    Mismatch {
        /// The blob.
        digest: Digest,
        /// Digest of its bytes.
        found: Digest,
    },
    /// No byte came for as long as the options say.
    #[error("no byte of blob {digest} came for {} s", patience.as_secs())]
    Stalled {
        /// The blob.
        digest: Digest,
        /// How long.
        patience: Duration,
    },
    /// The fetcher stops, or the caller does.
    #[error("download stopped")]
    Stopped,
}

impl From<FillError> for Failure {
    fn from(error: FillError) -> Self {
        let kind = match &error {
            FillError::Fetch { source, .. } => return source.clone(),
            FillError::Cache { .. } | FillError::Stopped => FetchErrorKind::System,
            FillError::Mismatch { .. } => FetchErrorKind::Damaged,
            FillError::Stalled { .. } => FetchErrorKind::Timeout,
        };
        Self::definite(kind, reason(&error))
    }
}

/// Fetches all of a blob and verifies it, as [`Fetcher::fill`](super::Fetcher::fill) does.
pub(super) fn fill(
    dispatcher: &Dispatcher,
    offer: &Offer,
    options: FillOptions,
    progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Result<(), FillError> {
    let digest = offer.digest;
    let mut mismatch = None;
    for _ in 0..2 {
        let opened = dispatcher.open(offer);
        let blob = opened.map_err(|source| FillError::Fetch { digest, source })?;
        let Some(partial) = blob.partial() else {
            let _ = progress(blob.identity().len());
            return Ok(());
        };
        fetch_all(dispatcher, &blob, &partial, options, progress)?;
        match complete(dispatcher, &blob, &partial, options.patience)? {
            None => return Ok(()),
            Some(found) => mismatch = Some(found),
        }
    }
    let found = mismatch.unwrap_or(digest);
    Err(FillError::Mismatch { digest, found })
}

/// Verifies a full blob; returns its digest if that is a wrong one.
fn complete(
    dispatcher: &Dispatcher,
    blob: &Blob,
    partial: &Arc<Partial>,
    patience: Option<Duration>,
) -> Result<Option<Digest>, FillError> {
    let digest = blob.digest();
    let since = Instant::now();
    loop {
        match partial.publish() {
            Ok(Publication::Published) => return Ok(None),
            Ok(Publication::Mismatch { found }) => {
                return Ok(Some(found));
            }
            // The upkeep thread found a wrong digest before, or a failed sync lost some units: the next
            // round fetches them.
            Ok(Publication::Incomplete) => return Ok(Some(digest)),
            Ok(Publication::Busy) => match patience {
                // Another process verifies the blob, or is stuck while it does.
                Some(patience) if since.elapsed() > patience => {
                    return Err(FillError::Stalled { digest, patience });
                }
                _ => thread::sleep(TICK),
            },
            Err(error) => {
                let source = Box::new(error);
                return Err(FillError::Cache { digest, source });
            }
        }
        if dispatcher.is_stopping() {
            return Err(FillError::Stopped);
        }
    }
}

/// Requests under way for one blob.
struct Filling<'a> {
    client: ClientId,
    dispatcher: &'a Dispatcher,
    blob: &'a Arc<Blob>,
    partial: &'a Partial,
    sender: mpsc::Sender<Result<(), Failure>>,
    receiver: Receiver<Result<(), Failure>>,
    /// First unit that was not asked for yet.
    next: u64,
    under_way: usize,
    bucket: Bucket,
}

fn fetch_all(
    dispatcher: &Dispatcher,
    blob: &Arc<Blob>,
    partial: &Partial,
    options: FillOptions,
    progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Result<(), FillError> {
    let digest = blob.digest();
    let (sender, receiver) = mpsc::channel();
    let bucket = Bucket::new(options.rate);
    let mut filling = Filling {
        client: dispatcher.new_client(),
        dispatcher,
        blob,
        partial,
        sender,
        receiver,
        next: 0,
        under_way: 0,
        bucket,
    };
    let (mut moved, mut before) = (Instant::now(), 0);
    loop {
        filling.ask(options);
        let present = filling.present();
        if progress(present).is_break() || dispatcher.is_stopping() {
            return Err(FillError::Stopped);
        }
        if filling.under_way == 0 && filling.next == blob.identity().units() {
            return Ok(());
        }
        if present != before {
            (moved, before) = (Instant::now(), present);
        }
        if let Some(patience) = options
            .patience
            .filter(|patience| moved.elapsed() > *patience)
        {
            return Err(FillError::Stalled { digest, patience });
        }
        match filling.receiver.recv_timeout(TICK) {
            Ok(Ok(())) => filling.under_way -= 1,
            Ok(Err(source)) => return Err(FillError::Fetch { digest, source }),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
        }
    }
}

impl Filling<'_> {
    /// Asks for blocks until as many as wanted are under way.
    fn ask(&mut self, options: FillOptions) {
        let all = self.blob.identity().units();
        let block = (options.block_size / UNIT).max(1);
        while self.under_way < options.parallel.max(1) && self.next < all {
            let left = UnitRange::new(self.next, all);
            let absent = self.partial.map().absent(left);
            let Some(run) = absent.first() else {
                self.next = all;
                return;
            };
            // Demand goes first: on a link that is full, a download would only delay it.
            if self.dispatcher.has_demand() {
                return;
            }
            if options.within_limits && self.dispatcher.space().pauses_downloads() {
                return;
            }
            let units = UnitRange::new(run.start(), run.end().min(run.start() + block));
            let bytes = self.blob.identity().bytes_of(units);
            if !self.bucket.take(bytes.end - bytes.start) {
                return;
            }
            self.next = units.end();
            self.under_way += 1;
            let sender = self.sender.clone();
            let waiter = Some(Waiter::Local { sender });
            self.dispatcher
                .want(self.client, self.blob, bytes, Cause::Background, waiter);
        }
    }

    fn present(&self) -> u64 {
        let units = self.partial.map().count(Bitmap::Live);
        (units * UNIT).min(self.blob.identity().len())
    }
}

/// A token bucket: bytes that may be asked for now.
struct Bucket {
    rate: Option<u64>,
    /// May be negative: a block is taken whole.
    tokens: f64,
    filled: Instant,
}

impl Bucket {
    fn new(rate: Option<u64>) -> Self {
        Self {
            rate,
            tokens: 0.0,
            filled: Instant::now(),
        }
    }

    fn take(&mut self, bytes: u64) -> bool {
        let Some(rate) = self.rate else { return true };
        let elapsed = self.filled.elapsed().as_secs_f64();
        self.filled = Instant::now();
        let rate = rate.max(1) as f64;
        self.tokens = (self.tokens + elapsed * rate).min(rate);
        if self.tokens < 0.0 {
            return false;
        }
        self.tokens -= bytes as f64;
        true
    }
}
