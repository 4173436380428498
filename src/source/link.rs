//! One end of the packet socket between a disk process and the fetcher.
//!
//! Any thread may send, and never waits: what the socket does not take at once is queued. One
//! thread takes turns ([`Link::turn`]): it waits for packets and sends what is queued.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::cmsg_space;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use super::protocol::{MESSAGE_LEN, Packet};

/// Most descriptors that come with a packet.
const MAX_FILES: usize = 2;

/// Packets taken in one turn, so that sending gets its turn too.
const BATCH: usize = 64;

/// Packets that may wait to be sent. A peer that lets more of them wait does not read.
const MAX_QUEUED: usize = 65_536;

/// A packet with its descriptors.
#[derive(Debug)]
pub struct Message {
    /// The bytes, as received: of any length.
    pub bytes: Vec<u8>,
    /// Descriptors, at most two.
    pub files: Vec<OwnedFd>,
}

/// Outcome of a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// The connection goes on.
    Open,
    /// The peer, or this side, has ended it.
    Ended,
}

#[derive(Debug)]
struct Queued {
    packet: Packet,
    files: Vec<OwnedFd>,
}

/// One end of the connection.
#[derive(Debug)]
pub struct Link {
    socket: OwnedFd,
    wake: OwnedFd,
    queue: Mutex<VecDeque<Queued>>,
    ended: AtomicBool,
}

impl Link {
    /// A link over a connected `SOCK_SEQPACKET` socket.
    ///
    /// # Errors
    /// The process has no descriptor left.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            socket,
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            queue: Mutex::default(),
            ended: AtomicBool::new(false),
        })
    }

    /// Sends a packet with descriptors. Never waits.
    pub fn send(&self, packet: Packet, files: Vec<OwnedFd>) {
        let mut queue = self.queue();
        let queued = Queued { packet, files };
        if queue.is_empty() {
            match self.transmit(&queued) {
                Ok(()) => return,
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(_) => return self.end(),
            }
        }
        queue.push_back(queued);
        let full = queue.len() > MAX_QUEUED;
        drop(queue);
        match full {
            true => self.end(),
            false => self.wake(),
        }
    }

    /// Ends the connection on this side: the thread that takes turns sees it.
    pub fn end(&self) {
        self.ended.store(true, Ordering::Release);
        self.wake();
    }

    /// Whether this side has ended the connection.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Waits for at most `timeout`, sends what is queued, and gives received packets to `each`.
    ///
    /// # Errors
    /// The socket fails.
    pub fn turn(&self, timeout: Duration, mut each: impl FnMut(Message)) -> io::Result<Turn> {
        self.wait(timeout)?;
        // Resets the counter; fails if that is zero.
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        if self.ended.load(Ordering::Acquire) {
            return Ok(Turn::Ended);
        }
        self.flush()?;
        for _ in 0..BATCH {
            match self.receive() {
                Ok(None) => return Ok(Turn::Ended),
                Ok(Some(message)) => each(message),
                Err(Errno::AGAIN | Errno::INTR) => break,
                Err(Errno::CONNRESET) => return Ok(Turn::Ended),
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(Turn::Open)
    }

    /// Events of the socket for which a thread that has several links takes a turn.
    pub fn awaited(&self) -> PollFlags {
        match self.queue().is_empty() {
            true => PollFlags::IN,
            false => PollFlags::IN | PollFlags::OUT,
        }
    }

    fn wait(&self, timeout: Duration) -> io::Result<()> {
        let mut polled = [
            PollFd::new(&self.socket, self.awaited()),
            PollFd::new(&self.wake, PollFlags::IN),
        ];
        let timeout = Timespec::try_from(timeout).ok();
        match poll(&mut polled, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn flush(&self) -> io::Result<()> {
        let mut queue = self.queue();
        while let Some(queued) = queue.front() {
            match self.transmit(queued) {
                Ok(()) => _ = queue.pop_front(),
                Err(Errno::AGAIN | Errno::INTR) => break,
                // The peer is gone, which the next receive reports.
                Err(Errno::PIPE | Errno::CONNRESET) => queue.clear(),
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    fn transmit(&self, queued: &Queued) -> Result<(), Errno> {
        transmit(&self.socket, &queued.packet, &queued.files)
    }

    /// The next packet; `None` at the connection's end.
    fn receive(&self) -> Result<Option<Message>, Errno> {
        let mut bytes = vec![0; MESSAGE_LEN + 1];
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FILES))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let into = &mut [IoSliceMut::new(&mut bytes)];
        let received = recvmsg(&self.socket, into, &mut control, flags)?;
        let mut files = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                files.extend(rights);
            }
        }
        if received.bytes == 0 {
            return Ok(None);
        }
        if received.flags.contains(ReturnFlags::CTRUNC) {
            files.clear();
        }
        bytes.truncate(received.bytes);
        Ok(Some(Message { bytes, files }))
    }

    fn wake(&self) {
        // Fails only at the counter's limit, where the thread is awake already.
        let _ = rustix::io::write(&self.wake, &1u64.to_le_bytes());
    }

    fn queue(&self) -> MutexGuard<'_, VecDeque<Queued>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn transmit(socket: &OwnedFd, packet: &Packet, files: &[OwnedFd]) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FILES))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let files: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
    if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&files)) {
        return Err(Errno::INVAL);
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    let bytes = [IoSlice::new(packet)];
    sendmsg(socket, &bytes, &mut control, flags).map(|_| ())
}

/// Sends one packet with descriptors over a socket that is no link. Waits for at most `patience`.
///
/// # Errors
/// The socket fails, or the peer does not read.
pub fn send_once(
    socket: &OwnedFd,
    packet: &Packet,
    files: &[OwnedFd],
    patience: Duration,
) -> io::Result<()> {
    let timeout = Timespec::try_from(patience).ok();
    match poll(&mut [PollFd::new(socket, PollFlags::OUT)], timeout.as_ref()) {
        Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
        Ok(_) | Err(Errno::INTR) => {}
        Err(errno) => return Err(errno.into()),
    }
    Ok(transmit(socket, packet, files)?)
}

/// A connected pair of sockets for two links.
///
/// # Errors
/// The process has no descriptor left.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    Ok(socketpair(family, kind, SocketFlags::CLOEXEC, None)?)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Seek, Write};

    use super::*;

    const SHORT: Duration = Duration::from_millis(1);

    fn links() -> (Link, Link) {
        let (one, other) = pair().unwrap();
        (Link::new(one).unwrap(), Link::new(other).unwrap())
    }

    fn packet(number: u32) -> Packet {
        let mut packet = [0; MESSAGE_LEN];
        packet[..4].copy_from_slice(&number.to_le_bytes());
        packet
    }

    #[test]
    fn packets_arrive_in_order_however_many_wait() {
        let (one, other) = links();
        for number in 0..5000 {
            one.send(packet(number), Vec::new());
        }
        let mut found = Vec::new();
        while found.len() < 5000 {
            assert_eq!(
                one.turn(SHORT, |_| panic!("nothing was sent")).unwrap(),
                Turn::Open
            );
            let turn = other.turn(SHORT, |message| found.push(message.bytes));
            assert_eq!(turn.unwrap(), Turn::Open);
        }
        let expected: Vec<_> = (0..5000).map(|number| packet(number).to_vec()).collect();
        assert!(found == expected);
    }

    #[test]
    fn descriptors_come_along() {
        let (one, other) = links();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"content").unwrap();
        let files = vec![file.try_clone().unwrap().into(), file.into()];
        one.send(packet(1), files);
        let mut received = Vec::new();
        other.turn(SHORT, |message| received.push(message)).unwrap();
        let [message] = <[Message; 1]>::try_from(received).unwrap();
        let [file, _] = <[OwnedFd; 2]>::try_from(message.files).unwrap();
        let (mut file, mut text) = (File::from(file), String::new());
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "content");
    }

    #[test]
    fn both_sides_see_the_end() {
        let (one, other) = links();
        one.send(packet(1), Vec::new());
        drop(one);
        let mut count = 0;
        assert_eq!(other.turn(SHORT, |_| count += 1).unwrap(), Turn::Ended);
        assert_eq!(count, 1, "what was sent before");
        let (one, _other) = links();
        one.end();
        let long = Duration::from_secs(60);
        assert_eq!(one.turn(long, |_| {}).unwrap(), Turn::Ended);
    }

    #[test]
    fn a_peer_that_does_not_read_is_given_up() {
        let (one, _other) = links();
        for number in 0..=(MAX_QUEUED as u32 + 5000) {
            one.send(packet(number), Vec::new());
        }
        assert_eq!(one.turn(SHORT, |_| {}).unwrap(), Turn::Ended);
    }
}
