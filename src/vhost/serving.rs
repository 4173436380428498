//! Serves the messages of one front-end: executes each and replies to it, until the connection ends.

use std::sync::Arc;

use super::channel::Channel;
use super::dispatch::dispatch;
use super::error::Error;
use super::handler::Handler;
use super::message::{Message, Reply};
use super::ownership::Ownership;
use super::refusal::Refusal;
use super::session::Session;
use crate::engine::stats::DiskCell;
use crate::ratelimited_log;
use crate::reason::reason;

/// Serves messages until the front-end disconnects, breaks the protocol, or loses the disk to another.
/// Then stops its queues.
///
/// # Errors
///
/// The error that ended the connection; none if the front-end disconnected.
pub fn serve(session: &Arc<Session>, ownership: &Ownership) -> Result<(), Error> {
    let mut serving = Serving {
        session,
        ownership,
        messages: 0,
        refused: 0,
    };
    let result = serving.serve_messages();
    session.end();
    let had_disk = ownership.give_back(session);
    serving.log_end(had_disk, &result);
    let leftover = session.lock().leftover();
    session.close(leftover);
    result
}

/// A session whose messages are served.
struct Serving<'s> {
    session: &'s Arc<Session>,
    ownership: &'s Ownership,
    /// Number of messages, for the log.
    messages: u64,
    /// Number of messages that were refused.
    refused: u64,
}

impl Serving<'_> {
    fn serve_messages(&mut self) -> Result<(), Error> {
        let channel = self.session.channel().map_err(Error::Setup)?;
        while let Some(mut message) = channel.receive()? {
            self.messages += 1;
            let served = self.serve_message(&channel, &mut message);
            self.session.close(message.files);
            served?;
        }
        match self.session.is_retired() {
            true => Err(Error::TakenOver),
            false => Ok(()),
        }
    }

    /// Executes one message, and replies to it.
    fn serve_message(&mut self, channel: &Channel, message: &mut Message) -> Result<(), Error> {
        let mut handler = self.session.lock();
        if handler.is_retired() {
            return Err(Error::TakenOver);
        }
        let mut outcome = dispatch(&mut handler, message);
        if outcome.is_ok() && handler.wants_disk() {
            drop(handler);
            self.ownership.give(self.session)?;
            handler = self.session.lock();
            outcome = handler.take_disk().and(outcome);
            self.log_start(&handler);
        }
        self.session.set_handed_over(handler.has_handed_over());
        drop(handler);
        // Reply even if REPLY_ACK was not acknowledged: the front-end waits, and may have acknowledged it
        // on an earlier connection.
        let replies = message.wants_reply;
        let request = message.request;
        match outcome {
            Ok(Some(reply)) => channel.send(request, &reply)?,
            Ok(None) if replies => channel.send(request, &Reply::number(0))?,
            Ok(None) => {}
            Err(refusal) if replies && !matches!(refusal, Refusal::Unknown) => {
                self.refused += 1;
                let name = self.session.peer();
                ratelimited_log::warn(format_args!(
                    "{name}: refused request {request}: {}",
                    reason(&refusal)
                ));
                channel.send(request, &Reply::number(1))?;
            }
            Err(source) => return Err(Error::Refused { request, source }),
        }
        Ok(())
    }

    fn log_start(&self, handler: &Handler) {
        let (name, features) = (self.session.peer(), handler.features());
        let stats = self.session.stats();
        stats.set(DiskCell::FrontEndFeatures, features);
        ratelimited_log::info(format_args!(
            "{name} uses the disk, with features {features:#x}"
        ));
    }

    fn log_end(&self, had_disk: bool, result: &Result<(), Error>) {
        let (name, stats) = (self.session.peer(), self.session.stats());
        let Self {
            messages, refused, ..
        } = self;
        match result {
            Err(Error::TakeoverRefused { .. }) => stats.count(DiskCell::TakeoversRefused),
            Ok(()) | Err(Error::TakenOver) => {}
            Err(_) => stats.count(DiskCell::FrontEndErrors),
        }
        match result {
            Ok(()) if had_disk => ratelimited_log::info(format_args!(
                "{name} disconnected after {messages} messages, {refused} of them refused"
            )),
            Ok(()) => log::debug!("{name} disconnected after {messages} messages"),
            Err(Error::TakenOver) => ratelimited_log::info(format_args!(
                "{name} was disconnected after {messages} messages, {refused} of them refused"
            )),
            Err(error) => ratelimited_log::warn(format_args!(
                "{name}: dropped the connection after {messages} messages: {}",
                reason(error)
            )),
        }
    }
}
