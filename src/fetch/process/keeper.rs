//! The keeper: a process that starts a fetcher, and another one when it ends; and its standby, which does the
//! same for the keeper.
//!
//! The keeper passes a copy of all that it holds ([`Held`]) to its standby. When the keeper ends unexpectedly, the
//! standby goes on in its place: with the fetcher that runs, or with another. Both end when no owner has its
//! control socket open and no disk its connection.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Child, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};
use rustix::process::Resource;

use super::held::{Held, Piece};
use super::message::OwnerMessage;
use super::{FETCHER, ITSELF, KEEPER, ProcessError, STANDBY, command, ignore_signals, set_name};
use crate::io::rlimit;
use crate::ratelimited_log;
use crate::reason::reason;
use crate::source::link::{self, Link, Turn};
use crate::source::protocol::MESSAGE_LEN;

/// Pauses between two starts of a fetcher.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// A fetcher that ran for so long did not fail at its start.
const SETTLED: Duration = Duration::from_secs(10);

/// When a standby is started: a program that ends sooner needs none.
const STANDBY_AFTER: Duration = Duration::from_secs(1);

/// How long a fetcher that disks share outlives the last of them: the next one finds its tokens and connections.
const LINGER: Duration = Duration::from_secs(5);

/// Longest wait for an event.
const TICK: Duration = Duration::from_secs(5);

/// Owners that are connected at a time; more wait.
const MAX_OWNERS: usize = 1024;

/// Starts fetchers until no owner and no disk is left.
pub(super) fn run(control: OwnedFd) -> Result<(), ProcessError> {
    let mut held = Held::default();
    held.add(Piece::Owner(0, control))?;
    Keeper::new(held).run()
}

/// Waits for the end of the keeper at the other end of `keeper`, and goes on in its place.
pub(super) fn run_standby(keeper: OwnedFd) -> Result<(), ProcessError> {
    ignore_signals();
    rlimit::raise(Resource::Nofile, u64::MAX);
    let keeper = Link::new(keeper)?;
    let mut held = Held::default();
    let mut turn = Turn::Open;
    while turn == Turn::Open {
        let mut pieces = Vec::new();
        turn = keeper.turn(TICK, |message| pieces.extend(Piece::decode(message)))?;
        pieces.into_iter().try_for_each(|piece| held.add(piece))?;
        held.drop_finished();
    }
    if held.is_over() {
        return Ok(());
    }
    ratelimited_log::warn(format_args!(
        "the keeper of the fetcher ended; another process goes on in its place"
    ));
    set_name(KEEPER);
    Keeper::new(held).run()
}

struct Keeper {
    held: Held,
    fetcher: Option<Child>,
    standby: Option<(Link, Child)>,
    /// When the fetcher was started, and when the next one may be.
    started: Instant,
    due: Instant,
    pause: Duration,
    /// When a standby may be started.
    standby_due: Instant,
    /// Since when no owner and no disk is left.
    idle: Option<Instant>,
}

impl Keeper {
    fn new(held: Held) -> Self {
        let now = Instant::now();
        Self {
            held,
            fetcher: None,
            standby: None,
            started: now,
            due: now,
            pause: FIRST_PAUSE,
            standby_due: now + STANDBY_AFTER,
            idle: None,
        }
    }

    fn run(mut self) -> Result<(), ProcessError> {
        ignore_signals();
        rlimit::raise(Resource::Nofile, u64::MAX);
        loop {
            self.held.drop_finished();
            if self.is_over() {
                break;
            }
            self.start_what_is_due();
            self.wait()?;
            self.accept();
            self.hear_owners();
            self.look_at_fetcher();
            self.look_at_standby();
        }
        self.end();
        Ok(())
    }

    /// Whether nothing is left to do. A fetcher that disks share is kept for a moment.
    fn is_over(&mut self) -> bool {
        if !self.held.is_over() {
            self.idle = None;
            return false;
        }
        let idle = *self.idle.get_or_insert_with(Instant::now);
        self.held.listener.is_none() || idle.elapsed() >= LINGER
    }

    fn start_what_is_due(&mut self) {
        let now = Instant::now();
        if self.held.fetcher.is_none() && self.held.config.is_some() && now >= self.due {
            self.started = now;
            if let Err(error) = self.start_fetcher() {
                ratelimited_log::error(format_args!("{}; trying again", reason(&error)));
                self.end_fetcher();
            }
        }
        if self.standby.is_none() && self.held.fetcher.is_some() && now >= self.standby_due {
            self.standby_due = now + LONGEST_PAUSE;
            match self.start_standby() {
                Ok(standby) => self.standby = Some(standby),
                Err(error) => ratelimited_log::warn(format_args!(
                    "cannot start the standby of the fetcher's keeper: {}",
                    reason(&error)
                )),
            }
        }
    }

    /// Starts a fetcher, and passes on to it all that it needs to know.
    fn start_fetcher(&mut self) -> Result<(), ProcessError> {
        let (ours, theirs) = link::pair()?;
        self.fetcher = Some(start(FETCHER, theirs)?);
        self.give(Piece::Fetcher(ours))?;
        let Held {
            fetcher: Some(fetcher),
            config: Some(config),
            orders,
            ..
        } = &self.held
        else {
            return Ok(());
        };
        fetcher.send([0; MESSAGE_LEN], vec![config.try_clone()?]);
        for order in orders {
            fetcher.send([0; MESSAGE_LEN], order.try_clone()?.into_files());
        }
        Ok(())
    }

    fn start_standby(&self) -> Result<(Link, Child), ProcessError> {
        let (ours, theirs) = link::pair()?;
        let link = Link::new(ours)?;
        // Before it runs: this process may be killed at any time from then on.
        for piece in self.held.pieces()? {
            let (packet, files) = piece.encode();
            link.send(packet, files);
        }
        let child = start(STANDBY, theirs)?;
        Ok((link, child))
    }

    /// Adds a piece to what is held, here and at the standby.
    fn give(&mut self, piece: Piece) -> io::Result<()> {
        if let Some((standby, _)) = &self.standby {
            let (packet, files) = piece.try_clone()?.encode();
            standby.send(packet, files);
        }
        self.held.add(piece)
    }

    /// Waits for a message, or for the end of anything that is held.
    fn wait(&self) -> io::Result<()> {
        let Held {
            owners,
            listener,
            orders,
            fetcher,
            ..
        } = &self.held;
        let standby = self.standby.as_ref().map(|(link, _)| link);
        let links = owners.iter().map(|(_, owner)| owner);
        let links = links.chain(fetcher).chain(standby);
        let mut polled: Vec<_> = links
            .map(|link| PollFd::from_borrowed_fd(link.as_fd(), link.awaited()))
            .collect();
        let listener = listener.as_ref().filter(|_| owners.len() < MAX_OWNERS);
        polled.extend(listener.map(|listener| PollFd::new(listener, PollFlags::IN)));
        let sockets = orders.iter().filter_map(|order| order.socket.as_ref());
        polled.extend(sockets.map(|socket| PollFd::new(socket, PollFlags::HUP)));
        let timeout = Timespec::try_from(self.longest_wait()).ok();
        match poll(&mut polled, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn longest_wait(&self) -> Duration {
        let until = |at: Instant| at.saturating_duration_since(Instant::now());
        let fetcher = self.held.fetcher.is_none() && self.held.config.is_some();
        let standby = self.standby.is_none() && self.held.fetcher.is_some();
        let fetcher = fetcher.then(|| until(self.due));
        let standby = standby.then(|| until(self.standby_due));
        let idle = self.idle.map(|idle| until(idle + LINGER));
        let waits = [fetcher, standby, idle, Some(TICK)];
        waits.into_iter().flatten().min().unwrap_or(TICK)
    }

    /// Takes further owners, and lets each know that it is served.
    fn accept(&mut self) {
        while let Some(listener) = &self.held.listener
            && self.held.owners.len() < MAX_OWNERS
            && let Ok(socket) = accept_with(listener, SocketFlags::CLOEXEC)
        {
            let number = self.held.next_owner();
            if let Err(error) = self.give(Piece::Owner(number, socket)) {
                ratelimited_log::error(format_args!("cannot take an owner: {error}"));
                return;
            }
            if let Some((_, owner)) = self.held.owners.last() {
                owner.send([0; MESSAGE_LEN], Vec::new());
            }
        }
    }

    /// Takes the messages of owners: the configuration first, then orders.
    fn hear_owners(&mut self) {
        let mut received = Vec::new();
        let mut gone = Vec::new();
        for (number, owner) in &self.held.owners {
            let turn = owner.turn(Duration::ZERO, |packet| {
                received.extend(OwnerMessage::new(packet));
            });
            if !matches!(turn, Ok(Turn::Open)) {
                gone.push(Piece::Gone(*number));
            }
        }
        for OwnerMessage { text, socket } in received {
            let taken = match (self.held.config.is_some(), socket) {
                // The first message is the configuration, with the socket for further owners.
                (false, Some(listener)) => {
                    let taken = self.take(Piece::Listener(listener));
                    taken.and_then(|()| self.take(Piece::Config(text)))
                }
                (false, None) => self.take(Piece::Config(text)),
                (true, Some(socket)) => {
                    let socket = Some(socket);
                    self.take(Piece::Order(OwnerMessage { text, socket }))
                }
                // Nothing could be answered.
                (true, None) => Ok(()),
            };
            report(taken);
        }
        for piece in gone {
            report(self.take(piece));
        }
    }

    /// Takes a piece, and passes orders on to the fetcher.
    fn take(&mut self, piece: Piece) -> io::Result<()> {
        let order = match &piece {
            Piece::Order(order) => Some(order.try_clone()?),
            _ => None,
        };
        self.give(piece)?;
        if let (Some(fetcher), Some(order)) = (&self.held.fetcher, order) {
            fetcher.send([0; MESSAGE_LEN], order.into_files());
        }
        Ok(())
    }

    fn look_at_fetcher(&mut self) {
        let Some(fetcher) = &self.held.fetcher else {
            return;
        };
        if matches!(fetcher.turn(Duration::ZERO, |_| {}), Ok(Turn::Open)) {
            return;
        }
        let status = self.end_fetcher();
        let status =
            status.map_or_else(|| "unknown status".to_owned(), |status| status.to_string());
        ratelimited_log::warn(format_args!(
            "the fetcher ended ({status}); starting another"
        ));
    }

    /// Forgets the fetcher, and lets the next one start after a pause.
    fn end_fetcher(&mut self) -> Option<ExitStatus> {
        self.held.fetcher = None;
        self.pause = match self.started.elapsed() > SETTLED {
            true => FIRST_PAUSE,
            false => (self.pause * 2).min(LONGEST_PAUSE),
        };
        self.due = Instant::now() + self.pause;
        end(self.fetcher.take()?)
    }

    fn look_at_standby(&mut self) {
        let Some((link, _)) = &self.standby else {
            return;
        };
        if matches!(link.turn(Duration::ZERO, |_| {}), Ok(Turn::Open)) {
            return;
        }
        if let Some((_, child)) = self.standby.take() {
            end(child);
        }
    }

    /// Ends with all processes that this one started.
    fn end(self) {
        drop(self.held);
        let standby = self.standby.map(|(_, child)| child);
        for mut child in self.fetcher.into_iter().chain(standby) {
            let _ = child.wait();
        }
    }
}

fn report(taken: io::Result<()>) {
    if let Err(error) = taken {
        ratelimited_log::error(format_args!(
            "the keeper of the fetcher cannot take a message: {error}"
        ));
    }
}

/// Ends a process that closed its control socket, and returns its status.
fn end(mut child: Child) -> Option<ExitStatus> {
    // It ends by itself, unless it was taken over.
    for _ in 0..20 {
        if let Ok(Some(status)) = child.try_wait() {
            return Some(status);
        }
        thread::sleep(Duration::from_millis(1));
    }
    let _ = child.kill();
    child.wait().ok()
}

/// Starts this program, called by this name, with the argument that this process was started with.
fn start(name: &str, input: OwnedFd) -> io::Result<Child> {
    let argument = std::env::args_os().nth(1);
    command(Path::new(ITSELF), name, argument.as_deref(), input).spawn()
}
