//! The keeper: a process that starts a fetcher, and another one when it ends.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::ExitStatus;
use std::thread;
use std::time::{Duration, Instant};

use super::message::OwnerMessage;
use super::{FETCHER, ITSELF, ProcessError, TICK, ignore_signals, spawn};
use crate::ratelimited_log;
use crate::source::link::{self, Link, Turn};

/// Pauses between two starts of a fetcher.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// A fetcher that ran for so long did not fail at its start.
const SETTLED: Duration = Duration::from_secs(10);

/// Starts fetchers until the owner closes the control socket.
pub(super) fn run(control: OwnedFd) -> Result<(), ProcessError> {
    ignore_signals();
    let control = Link::new(control)?;
    let mut kept: Vec<OwnerMessage> = Vec::new();
    let mut pause = FIRST_PAUSE;
    loop {
        let started = Instant::now();
        let Some(status) = keep_one(&control, &mut kept)? else {
            return Ok(());
        };
        ratelimited_log::warn(format_args!(
            "the fetcher ended ({status}); starting another"
        ));
        pause = match started.elapsed() > SETTLED {
            true => FIRST_PAUSE,
            false => (pause * 2).min(LONGEST_PAUSE),
        };
        thread::sleep(pause);
    }
}

/// Starts a fetcher, and passes messages of the owner on to it until it ends. `kept` are the messages that
/// the next fetcher needs as well. Returns `None` once the owner closed the control socket.
fn keep_one(
    control: &Link,
    kept: &mut Vec<OwnerMessage>,
) -> Result<Option<ExitStatus>, ProcessError> {
    let (ours, theirs) = link::pair()?;
    let mut fetcher = spawn(Path::new(ITSELF), FETCHER, theirs)?;
    for message in kept.iter() {
        // A fetcher that is gone is noticed below; its successor gets all that is kept.
        let _ = message.pass_on(&ours);
    }
    loop {
        let mut received = Vec::new();
        let turn = control.turn(TICK, |packet| received.extend(OwnerMessage::new(packet)))?;
        for message in received {
            let _ = message.pass_on(&ours);
            kept.push(message);
        }
        kept.retain(|message| !message.is_over());
        if turn == Turn::Ended {
            drop(ours);
            fetcher.wait()?;
            return Ok(None);
        }
        if let Some(status) = fetcher.try_wait()? {
            return Ok(Some(status));
        }
    }
}
