//! A blob that a disk process may ask for. It is opened on a thread of its own: that may wait for storage
//! and, if the image does not say how long the blob is, for its registry.

use std::ops::Range;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::blob::{Blob, Offer};
use super::dispatcher::Dispatcher;
use super::fair_queue::ClientId;
use super::holder::Holder;
use super::jitter::jitter;
use super::locks::{Rank, RankedMutex};
use super::origin::Failure;
use super::waiter::Waiter;
use crate::ratelimited_log;
use crate::source::FetchErrorKind;
use crate::source::link::Link;
use crate::source::protocol::{Cause, Reply, Subject};

/// How often an opening that failed looks whether its disk is gone.
const TICK: Duration = Duration::from_millis(100);

/// Pause after a first failure to open a blob, and the longest one after many.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const MAX_PAUSE: Duration = Duration::from_secs(5);

/// Requests without a waiter that are kept while a blob is opened; more are dropped.
const MAX_HINTS: usize = 4096;

/// What a disk process asks of a blob.
#[derive(Debug)]
pub(super) enum Asked {
    /// Its descriptors.
    Descriptors,
    /// Bytes of it.
    Bytes {
        bytes: Range<u64>,
        cause: Cause,
        waiter: Option<Waiter>,
    },
}

impl Asked {
    /// Whether it outwaits this failure to open the blob: a guest depends on it.
    fn outwaits(&self, failure: &Failure) -> bool {
        match self {
            Self::Descriptors => false,
            Self::Bytes { cause, .. } => {
                cause.is_of_guest() && failure.kind != FetchErrorKind::Damaged
            }
        }
    }

    fn is_hint(&self) -> bool {
        matches!(self, Self::Bytes { waiter: None, .. })
    }
}

#[derive(Debug)]
enum Slot {
    Closed,
    /// A thread opens the blob; this was asked meanwhile.
    Opening(Vec<Asked>),
    Open(Arc<Blob>),
}

/// A blob that is offered to a disk process.
#[derive(Debug)]
pub(super) struct Offered {
    /// The blob's place in the list of offers.
    number: u32,
    client: ClientId,
    offer: Offer,
    dispatcher: Arc<Dispatcher>,
    link: Arc<Link>,
    slot: RankedMutex<Slot>,
}

impl Offered {
    pub(super) fn new(
        client: ClientId,
        number: u32,
        offer: Offer,
        dispatcher: &Arc<Dispatcher>,
        link: &Arc<Link>,
    ) -> Arc<Self> {
        Arc::new(Self {
            number,
            client,
            offer,
            dispatcher: Arc::clone(dispatcher),
            link: Arc::clone(link),
            slot: RankedMutex::new(Rank::Offered, Slot::Closed),
        })
    }

    /// What the blob is offered as.
    pub(super) fn offer(&self) -> &Offer {
        &self.offer
    }

    /// The blob, if it is open.
    pub(super) fn opened(&self) -> Option<Arc<Blob>> {
        match &*self.slot.lock() {
            Slot::Open(blob) => Some(Arc::clone(blob)),
            Slot::Closed | Slot::Opening(_) => None,
        }
    }

    /// Answers `asked`, at once or once the blob is open. Never waits.
    pub(super) fn ask(self: &Arc<Self>, asked: Asked) {
        let mut slot = self.slot.lock();
        match &mut *slot {
            Slot::Open(blob) => {
                let blob = Arc::clone(blob);
                drop(slot);
                self.answer(&blob, asked);
            }
            Slot::Opening(before) => {
                if !asked.is_hint() || before.len() < MAX_HINTS {
                    before.push(asked);
                }
            }
            Slot::Closed => {
                *slot = Slot::Opening(vec![asked]);
                drop(slot);
                self.start();
            }
        }
    }

    fn start(self: &Arc<Self>) {
        let own = Arc::clone(self);
        let thread = thread::Builder::new().name("fetch-open".to_owned());
        if let Err(error) = thread.spawn(move || own.open()) {
            ratelimited_log::error(format_args!(
                "cannot start a thread to open a blob: {error}"
            ));
            self.link.end();
        }
    }

    /// Opens the blob, again and again while a guest waits for it.
    fn open(&self) {
        let mut pause = FIRST_PAUSE;
        while !self.is_over() {
            let opened = self.dispatcher.open(&self.offer);
            let failure = match opened.and_then(|blob| self.introduce(blob)) {
                Ok(blob) => return self.hand_out(&blob),
                Err(failure) => failure,
            };
            if !self.refuse(&failure) {
                return;
            }
            ratelimited_log::warn(format_args!(
                "cannot open blob {}: {failure}; uncached reads wait",
                self.offer.digest
            ));
            self.wait(pause.mul_f64(jitter()));
            pause = MAX_PAUSE.min(pause * 2);
        }
    }

    /// Sends the descriptors before any byte is reported present in them: an earlier fetcher may have sent those
    /// of other files.
    fn introduce(&self, blob: Arc<Blob>) -> Result<Arc<Blob>, Failure> {
        let holder = Holder::new(&self.link, self.number);
        let added = blob.add_holder(holder);
        added.map_err(|error| Failure::definite(FetchErrorKind::System, error.to_string()))?;
        Ok(blob)
    }

    fn hand_out(&self, blob: &Arc<Blob>) {
        let slot = std::mem::replace(&mut *self.slot.lock(), Slot::Open(Arc::clone(blob)));
        if let Slot::Opening(asked) = slot {
            let asked = asked.into_iter();
            // The descriptors were sent.
            let bytes = asked.filter(|asked| matches!(asked, Asked::Bytes { .. }));
            bytes.for_each(|asked| self.answer(blob, asked));
        }
    }

    /// Tells those that do not outwait the failure, and returns whether any does.
    fn refuse(&self, failure: &Failure) -> bool {
        let mut slot = self.slot.lock();
        let Slot::Opening(asked) = &mut *slot else {
            return false;
        };
        let refused: Vec<_> = asked
            .extract_if(.., |asked| !asked.outwaits(failure))
            .collect();
        let waits = !asked.is_empty();
        if !waits {
            *slot = Slot::Closed;
        }
        drop(slot);
        for asked in refused {
            match asked {
                Asked::Descriptors => self.refuse_descriptors(failure),
                Asked::Bytes { waiter, .. } => {
                    if let Some(waiter) = waiter {
                        waiter.answer(Err(failure));
                    }
                }
            }
        }
        waits
    }

    fn answer(&self, blob: &Arc<Blob>, asked: Asked) {
        match asked {
            Asked::Bytes {
                bytes,
                cause,
                waiter,
            } => self
                .dispatcher
                .want(self.client, blob, bytes, cause, waiter),
            Asked::Descriptors => self.send_descriptors(blob),
        }
    }

    fn send_descriptors(&self, blob: &Blob) {
        let holder = Holder::new(&self.link, self.number);
        if let Err(error) = holder.send(&blob.entry(), blob.identity()) {
            let failure = Failure::definite(FetchErrorKind::System, error.to_string());
            self.refuse_descriptors(&failure);
        }
    }

    fn refuse_descriptors(&self, failure: &Failure) {
        let reply = Reply::Failed {
            subject: Subject::Blob(self.number),
            kind: failure.kind,
            reason: failure.reason.clone(),
        };
        self.link.send(reply.encode(), Vec::new());
    }

    fn is_over(&self) -> bool {
        self.dispatcher.is_stopping() || self.link.has_ended()
    }

    fn wait(&self, pause: Duration) {
        let start = Instant::now();
        while start.elapsed() < pause && !self.is_over() {
            thread::sleep(TICK.min(pause));
        }
    }
}
