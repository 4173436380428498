//! The health of a mirror or proxy: after several failures it is skipped for a while.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::breaker::{Breakers, Policy};
use super::error::Error;
use crate::ratelimited_log;
use crate::reason::reason;

/// A mirror is skipped after so many failures, for so long.
const POLICY: Policy = Policy {
    limit: 5,
    first_pause: Duration::from_secs(5),
    max_pause: Duration::from_secs(60),
};

/// Failures of a mirror; the readers of its answers report them.
#[derive(Clone, Debug)]
pub(super) struct Health {
    breakers: Arc<Breakers>,
    name: String,
}

impl Health {
    /// The health of the mirror `name`, which has not failed yet.
    pub(super) fn new(name: String) -> Health {
        let breakers = Arc::new(Breakers::new(POLICY));
        Health { breakers, name }
    }

    /// Name of the mirror.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Whether the mirror may be asked now.
    pub(super) fn admit(&self) -> bool {
        self.breakers.admit(&self.name, Instant::now()).is_ok()
    }

    /// Records a good answer.
    pub(super) fn succeeded(&self) {
        if self.breakers.succeeded(&self.name) {
            ratelimited_log::info(format_args!("mirror {} answers again", self.name));
        }
    }

    /// Records a failed request.
    pub(super) fn failed(&self, error: Error) {
        if self.breakers.failed(&self.name, Instant::now(), error) {
            ratelimited_log::warn(format_args!(
                "mirror {} failed repeatedly; using the registry instead",
                self.name
            ));
        }
    }

    /// Records a body that broke off or stalled. The mirror is skipped at once: a reader has waited for it,
    /// and the next attempt must reach the registry.
    pub(super) fn broke_off(&self, error: Error) {
        let text = reason(&error);
        if self.breakers.open(&self.name, Instant::now(), error) {
            let name = &self.name;
            ratelimited_log::warn(format_args!(
                "mirror {name} broke off: {text}; using the registry for a while"
            ));
        }
    }
}
