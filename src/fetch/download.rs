//! Downloads the blobs of a disk while it is served, as upstream's `download` object asks.

use std::io;
use std::ops::ControlFlow;
use std::sync::{Arc, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::blob::Offer;
use super::dispatcher::Dispatcher;
use super::fill::{FillOptions, fill};
use super::jitter::jitter;
use crate::format::download;
use crate::ratelimited_log;
use crate::reason::reason;
use crate::source::link::Link;

/// Pause before a blob that failed is tried again.
const AGAIN: Duration = Duration::from_secs(600);

const TICK: Duration = Duration::from_millis(200);

/// When and how fast to download.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Download {
    /// Pause before the first byte.
    pub delay: Duration,
    /// A random part of this is added to the pause, so that many disks do not start at once.
    pub delay_extra: Duration,
    /// Bytes a second, at most.
    pub rate: u64,
    /// Attempts for each blob, before it is left alone for ten minutes.
    pub attempts: u32,
    /// Bytes of one request.
    pub block_size: u64,
}

impl Default for Download {
    /// Upstream's defaults, but for larger requests: of 256 KiB they are ten times as many, and
    /// registries count them.
    fn default() -> Self {
        Self {
            delay: Duration::from_secs(300),
            delay_extra: Duration::from_secs(30),
            rate: 100 << 20,
            attempts: 5,
            block_size: 8 << 20,
        }
    }
}

impl Download {
    /// As an image or a service configuration says; `None` if it says not to.
    pub fn configured(configured: &download::Download) -> Option<Self> {
        configured.enabled().then(|| Self {
            delay: configured.delay(),
            delay_extra: configured.delay_extra(),
            rate: configured.rate().unwrap_or(u64::MAX),
            attempts: configured.attempts(),
            block_size: configured.block_size(),
        })
    }
}

/// A download, and what ends it.
struct Running {
    download: Download,
    dispatcher: Arc<Dispatcher>,
    /// The disk's connection.
    disk: Weak<Link>,
}

impl Download {
    /// Starts a thread that downloads blob after blob until the disk is gone.
    pub(super) fn start(
        self,
        dispatcher: Arc<Dispatcher>,
        offers: Vec<Offer>,
        disk: Weak<Link>,
    ) -> io::Result<JoinHandle<()>> {
        let running = Running {
            download: self,
            dispatcher,
            disk,
        };
        thread::Builder::new()
            .name("fetch-download".to_owned())
            .spawn(move || running.run(offers))
    }
}

impl Running {
    fn run(&self, mut offers: Vec<Offer>) {
        let extra = self.download.delay_extra.mul_f64(2.0 * jitter() - 1.0);
        self.wait(self.download.delay + extra);
        while !offers.is_empty() && !self.is_over() {
            offers.retain(|offer| !self.try_to_complete(offer));
            if !offers.is_empty() {
                self.wait(AGAIN);
            }
        }
    }

    /// Downloads a blob, and returns whether it is complete.
    fn try_to_complete(&self, offer: &Offer) -> bool {
        let options = FillOptions {
            parallel: 2,
            block_size: self.download.block_size,
            rate: Some(self.download.rate),
            patience: None,
            within_limits: true,
        };
        for attempt in 1..=self.download.attempts.max(1) {
            let mut go_on = |_| match self.is_over() {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            };
            match fill(&self.dispatcher, offer, options, &mut go_on) {
                Ok(()) => return true,
                Err(_) if self.is_over() => return false,
                Err(error) => {
                    let digest = offer.digest;
                    ratelimited_log::warn(format_args!(
                        "cannot download blob {digest} in the background (attempt {attempt}): {}",
                        reason(&error)
                    ));
                }
            }
        }
        false
    }

    fn is_over(&self) -> bool {
        self.dispatcher.is_stopping() || self.disk.strong_count() == 0
    }

    fn wait(&self, pause: Duration) {
        let start = Instant::now();
        while start.elapsed() < pause && !self.is_over() {
            thread::sleep(TICK.min(pause));
        }
    }
}
