//! Errors that end a front-end connection.

use std::io;

use super::channel::ChannelError;
use super::refusal::Refusal;

/// Error that ends a connection.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No more messages can be exchanged.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// A message was refused, and the front-end asked for no reply that could report it.
    #[error("request {request} was refused")]
    Refused {
        /// Number of the request.
        request: u32,
        /// Reason.
        source: Refusal,
    },
    /// Another front-end started a queue.
    #[error("another front-end started a queue and has taken the disk over")]
    TakenOver,
    /// The takeover policy leaves the disk to the front-end that has it.
    #[error(
        "the disk stays with the {owner}, which is connected (--takeover); give each VM a disk and a socket of \
         its own"
    )]
    TakeoverRefused {
        /// The front-end that has the disk.
        owner: String,
    },
    /// The connection cannot be set up.
    #[error("cannot set up the connection")]
    Setup(#[source] io::Error),
}
