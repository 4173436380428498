//! Reports front-ends as events: those that get a disk or leave it, and those to which a takeover was refused.
//!
//! Disk processes count them in their statistics pages. The pages are compared with their earlier values every second,
//! so that no disk process has to know the node.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::disk::{Disk, State};
use super::disks::Disks;
use super::events::Kind;
use super::id::DiskId;
use crate::engine::stats::DiskCell;
use crate::engine::stats::figures::Figures;
use crate::ratelimited_log;

/// Pause between two looks at the pages.
const PERIOD: Duration = Duration::from_secs(1);

/// What a page says of front-ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Seen {
    /// Process of the front-end that has the disk; 0 if that is unknown.
    owner: Option<u64>,
    takeovers_refused: u64,
}

impl Seen {
    fn of(figures: &Figures) -> Self {
        let connected = figures.disk(DiskCell::Connected) != 0;
        Self {
            owner: connected.then(|| figures.disk(DiskCell::FrontEndPid)),
            takeovers_refused: figures.disk(DiskCell::TakeoversRefused),
        }
    }

    /// The events between an earlier look and this one.
    fn events_since(self, before: Self) -> Vec<(Kind, Option<String>)> {
        let mut events = Vec::new();
        if self.owner != before.owner {
            if before.owner.is_some() {
                events.push((Kind::Disconnected, None));
            }
            if let Some(pid) = self.owner {
                events.push((Kind::Connected, Some(format!("process {pid}"))));
            }
        }
        let refused = self
            .takeovers_refused
            .saturating_sub(before.takeovers_refused);
        if refused > 0 {
            let reason =
                format!("{refused} front-ends did not get the disk from the one that has it");
            events.push((Kind::TakeoverRefused, Some(reason)));
        }
        events
    }
}

/// Reports front-ends for ever.
pub async fn report(disks: Arc<Disks>) {
    let mut seen = BTreeMap::new();
    loop {
        tokio::time::sleep(PERIOD).await;
        let node = disks.clone();
        let look = move || {
            look(&node, &mut seen);
            seen
        };
        // Files are read on a thread that may block.
        seen = match tokio::task::spawn_blocking(look).await {
            Ok(seen) => seen,
            Err(error) => {
                ratelimited_log::error(format_args!("cannot report front-ends: {error}"));
                return;
            }
        };
    }
}

fn look(disks: &Disks, seen: &mut BTreeMap<DiskId, Seen>) {
    let all = disks.all();
    seen.retain(|id, _| all.iter().any(|disk| disk.id() == id));
    for disk in all.iter().filter(|disk| disk.state() == State::Listening) {
        report_one(disks, disk, seen);
    }
}

fn report_one(disks: &Disks, disk: &Disk, seen: &mut BTreeMap<DiskId, Seen>) {
    let now = Seen::of(&disks.figures(disk));
    let before = seen.insert(disk.id().clone(), now).unwrap_or_default();
    for (kind, reason) in now.events_since(before) {
        disks.events().add(disk.id(), kind, reason);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_reported_once() {
        let owner = |pid| Seen {
            owner: Some(pid),
            takeovers_refused: 5,
        };
        let kinds = |now: Seen, before| {
            let events = now.events_since(before);
            events.into_iter().map(|(kind, _)| kind).collect::<Vec<_>>()
        };
        let none = Seen::default();
        assert_eq!(kinds(none, none), []);
        assert_eq!(
            kinds(owner(7), none),
            [Kind::Connected, Kind::TakeoverRefused]
        );
        assert_eq!(kinds(owner(7), owner(7)), []);
        assert_eq!(
            kinds(owner(8), owner(7)),
            [Kind::Disconnected, Kind::Connected]
        );
        // The page of the next process begins at zero.
        assert_eq!(kinds(none, owner(7)), [Kind::Disconnected]);
    }
}
