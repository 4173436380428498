//! A queue in which the disks of a fetcher take turns: one with much to fetch delays no other.

use std::collections::{BTreeMap, VecDeque};

/// A disk process, or a download, that wants units.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct ClientId(pub(super) u64);

/// Items by client.
#[derive(Debug)]
pub(super) struct FairQueue<T> {
    items: BTreeMap<ClientId, VecDeque<T>>,
    /// The client whose turn was last.
    last: ClientId,
}

impl<T> Default for FairQueue<T> {
    fn default() -> Self {
        Self {
            items: BTreeMap::new(),
            last: ClientId(0),
        }
    }
}

impl<T> FairQueue<T> {
    /// Adds an item behind all of its client.
    pub(super) fn push_back(&mut self, client: ClientId, item: T) {
        self.items.entry(client).or_default().push_back(item);
    }

    /// Adds an item before all of its client.
    pub(super) fn push_front(&mut self, client: ClientId, item: T) {
        self.items.entry(client).or_default().push_front(item);
    }

    /// Takes the next item of the next client that `may` have one.
    pub(super) fn pop(&mut self, may: impl Fn(ClientId) -> bool) -> Option<T> {
        let behind = self.items.range(self.last..).map(|(client, _)| *client);
        let behind = behind.filter(|client| *client != self.last);
        let before = self.items.range(..=self.last).map(|(client, _)| *client);
        let client = behind.chain(before).find(|client| may(*client))?;
        self.last = client;
        let items = self.items.get_mut(&client)?;
        let item = items.pop_front();
        if items.is_empty() {
            self.items.remove(&client);
        }
        item
    }

    /// Removes all items of a client.
    pub(super) fn remove(&mut self, client: ClientId) -> VecDeque<T> {
        self.items.remove(&client).unwrap_or_default()
    }

    /// Number of items of a client.
    pub(super) fn len_of(&self, client: ClientId) -> usize {
        self.items.get(&client).map_or(0, VecDeque::len)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.items.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_take_turns() {
        let mut queue = FairQueue::default();
        for item in 0..4 {
            queue.push_back(ClientId(7), (7, item));
        }
        queue.push_back(ClientId(9), (9, 0));
        queue.push_back(ClientId(3), (3, 1));
        queue.push_front(ClientId(3), (3, 0));
        let taken: Vec<_> = std::iter::from_fn(|| queue.pop(|_| true)).collect();
        let expected = [(3, 0), (7, 0), (9, 0), (3, 1), (7, 1), (7, 2), (7, 3)];
        assert_eq!(taken, expected);
        assert!(queue.is_empty());
    }

    #[test]
    fn a_client_that_may_not_is_skipped_and_keeps_its_items() {
        let mut queue = FairQueue::default();
        queue.push_back(ClientId(1), "a");
        queue.push_back(ClientId(2), "b");
        assert_eq!(queue.pop(|client| client == ClientId(2)), Some("b"));
        assert_eq!(queue.pop(|client| client == ClientId(2)), None);
        assert_eq!(queue.len_of(ClientId(1)), 1);
        assert_eq!(queue.remove(ClientId(1)), ["a"]);
        assert_eq!(queue.pop(|_| true), None);
    }
}
