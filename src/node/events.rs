//! Numbered events, kept in a ring, for clients that wait for the next one.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;
use tokio::sync::Notify;

use super::clock;
use super::id::DiskId;

/// Number of events that are kept.
const KEPT: usize = 4096;

/// A change of a disk.
#[derive(Clone, Debug, Serialize)]
pub struct Event {
    /// Ascends by 1, from 1 at the node's start.
    pub number: u64,
    /// Seconds since 1970.
    pub time: u64,
    /// The disk.
    pub disk: DiskId,
    /// Kind of change.
    pub event: Kind,
    /// The reason, for failures and restarts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Kinds of event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The disk was created and listens.
    Added,
    /// The disk was found again by a new node.
    Found,
    /// Its process ended and was started again.
    Restarted,
    /// Its process keeps ending; it is not started again.
    Failed,
    /// The disk has another size.
    Resized,
    /// A front-end got the disk.
    Connected,
    /// The front-end that had the disk has left it.
    Disconnected,
    /// A front-end did not get the disk, because the takeover policy left it to another.
    TakeoverRefused,
    /// A snapshot was taken.
    Snapshot,
    /// The disk was removed.
    Removed,
}

/// Answer to a wait for events.
#[derive(Clone, Debug, Serialize)]
pub struct Batch {
    /// Value of `after` for the next request.
    pub next: u64,
    /// Whether events after the requested number are no longer kept.
    pub lost: bool,
    /// The events, oldest first.
    pub events: Vec<Event>,
}

/// The ring.
#[derive(Debug, Default)]
pub struct Events {
    ring: Mutex<(u64, VecDeque<Event>)>,
    added: Notify,
}

impl Events {
    /// Adds an event.
    pub fn add(&self, disk: &DiskId, event: Kind, reason: Option<String>) {
        let mut ring = self.lock();
        ring.0 += 1;
        let event = Event {
            number: ring.0,
            time: clock::now(),
            disk: disk.clone(),
            event,
            reason,
        };
        if ring.1.len() == KEPT {
            ring.1.pop_front();
        }
        ring.1.push_back(event);
        drop(ring);
        self.added.notify_waiters();
    }

    /// Returns the number of events since the start.
    pub fn count(&self) -> u64 {
        self.lock().0
    }

    /// Returns the events with a number above `after`; waits at most `wait` for the first.
    pub async fn after(&self, after: u64, wait: Duration) -> Batch {
        let end = tokio::time::Instant::now() + wait;
        loop {
            // Registered before the ring is read, so that an event in between is not missed.
            let added = self.added.notified();
            let batch = self.look(after);
            if !batch.events.is_empty() || tokio::time::timeout_at(end, added).await.is_err() {
                return batch;
            }
        }
    }

    fn look(&self, after: u64) -> Batch {
        let ring = self.lock();
        let first = ring.1.front().map_or(ring.0 + 1, |event| event.number);
        let events = ring
            .1
            .iter()
            .filter(|event| event.number > after)
            .cloned()
            .collect();
        // A number beyond the newest one comes from a former node: begin anew.
        Batch {
            next: ring.0,
            lost: after > ring.0 || after + 1 < first,
            events,
        }
    }

    fn lock(&self) -> MutexGuard<'_, (u64, VecDeque<Event>)> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn events_are_numbered_and_losses_are_told() {
        let events = Events::default();
        let disk: DiskId = "a".parse().unwrap();
        let none = events.after(0, Duration::ZERO).await;
        assert_eq!((none.next, none.lost, none.events.len()), (0, false, 0));
        for _ in 0..KEPT + 3 {
            events.add(&disk, Kind::Added, None);
        }
        let all = events.after(0, Duration::ZERO).await;
        assert!(all.lost);
        assert_eq!(all.events.len(), KEPT);
        let last = events.after(all.next - 1, Duration::ZERO).await;
        assert_eq!((last.lost, last.events.len()), (false, 1));
        assert!(events.after(all.next + 7, Duration::ZERO).await.lost);
        let waited = tokio::join!(events.after(all.next, Duration::from_secs(60)), async {
            events.add(&disk, Kind::Removed, Some("x".to_owned()));
        });
        assert_eq!(waited.0.events[0].event, Kind::Removed);
    }
}
