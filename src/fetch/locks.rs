//! The locks of the fetcher, and the order in which a thread takes them.
//!
//! | rank | lock | guards | held while waiting for |
//! |---|---|---|---|
//! | 1 | [`Rank::Threads`] | the threads of a fetcher | nothing |
//! | 2 | [`Rank::Opening`] | one opening of a blob at a time | the cache's lock, storage |
//! | 3 | [`Rank::Streaming`] | a whole blob is streamed | the network |
//! | 4 | [`Rank::Syncing`] | when units of a blob were made durable last | storage |
//! | 5 | [`Rank::State`] | the schedule and the open blobs | nothing |
//! | 6 | [`Rank::Readers`] | readers of a blob and the pace of its origin | nothing |
//! | 7 | [`Rank::Sources`] | origins of a blob and their failures | nothing |
//! | 8 | [`Rank::Holders`] | the disk processes that have a blob open | nothing |
//! | 9 | [`Rank::Stored`] | what the cache has of a blob | nothing |
//! | 10 | [`Rank::Suspects`] | damage to be looked at | nothing |
//! | 11 | [`Rank::Filling`] | blobs that a session has fetched whole | nothing |
//! | 12 | [`Rank::Offered`] | whether a session has a blob open, and what was asked meanwhile | nothing |
//!
//! [`ranked_lock`] holds the code to that. The locks of `source::link` and `cache` are taken last: no
//! code of this module runs while they are held.

use crate::io::ranked_lock;

/// Place of a lock in the order.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rank {
    /// In a [`Fetcher`](super::Fetcher).
    Threads = 1,
    /// In the [`Dispatcher`](super::dispatcher::Dispatcher).
    Opening,
    /// In a [`Blob`](super::blob::Blob).
    Streaming,
    /// In a [`Blob`](super::blob::Blob).
    Syncing,
    /// In the [`Dispatcher`](super::dispatcher::Dispatcher).
    State,
    /// In a [`Blob`](super::blob::Blob).
    Readers,
    /// In a [`Blob`](super::blob::Blob).
    Sources,
    /// In a [`Blob`](super::blob::Blob).
    Holders,
    /// In a [`Blob`](super::blob::Blob).
    Stored,
    /// In the [`Dispatcher`](super::dispatcher::Dispatcher).
    Suspects,
    /// In a session.
    Filling,
    /// In an [`Offered`](super::offered::Offered).
    Offered,
}

impl ranked_lock::Rank for Rank {
    fn number(self) -> u8 {
        self as u8
    }
}

/// A mutex with a rank.
pub(super) type RankedMutex<T> = ranked_lock::RankedMutex<Rank, T>;
