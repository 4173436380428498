//! One message: what its body and its descriptors may be.
#![cfg_attr(
    not(test),
    warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)
)]

use std::fs::File;

use rustix::fs::FileType;
use rustix::net::sockopt::{socket_domain, socket_type};
use rustix::net::{AddressFamily, SocketType};
use vhost::vhost_user::message::VhostUserMsgValidator;

use super::error::Refusal;
use crate::io::file_system;

/// A message as received.
#[derive(Debug)]
pub struct Message {
    /// The request's number.
    pub request: u32,
    /// Whether the front-end waits for a reply that the request does not have by itself.
    pub wants_reply: bool,
    /// Its body.
    pub body: Vec<u8>,
    /// The descriptors that came with it.
    pub files: Vec<File>,
}

/// What a request is answered with.
#[derive(Debug)]
pub struct Reply {
    /// The body.
    pub body: Vec<u8>,
    /// A descriptor to go with it.
    pub file: Option<File>,
}

impl Reply {
    /// A reply of one number.
    pub fn number(value: u64) -> Self {
        Self::bytes(value.to_le_bytes().to_vec())
    }

    /// A reply without a descriptor.
    pub fn bytes(body: Vec<u8>) -> Self {
        Self { body, file: None }
    }
}

/// The kind of file that a descriptor must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A file that can be mapped: memory, in-flight area, log.
    Memory,
    /// An eventfd. The kernel does not tell kinds of anonymous inodes apart; none but an eventfd
    /// lets a write wait.
    Eventfd,
    /// The end of a stream of bytes.
    Stream,
    /// A Unix stream socket. A message sent to one waits for nothing that its other holders do.
    UnixStream,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Memory => "a file that can be mapped",
            Kind::Eventfd => "an eventfd",
            Kind::Stream => "a pipe, socket or regular file",
            Kind::UnixStream => "a Unix stream socket",
        }
    }

    /// Checks that `file` is of this kind.
    ///
    /// # Errors
    ///
    /// [`Refusal::Kind`] if it is not; [`Refusal::FileSystem`] if it is to be mapped, and its file system may
    /// wait for another process.
    pub fn check(self, file: &File) -> Result<(), Refusal> {
        let mode = file_system::mode(file).map_err(Refusal::Examine)?;
        let found = FileType::from_raw_mode(mode);
        let right = match self {
            Kind::Memory => matches!(found, FileType::RegularFile | FileType::CharacterDevice),
            // An anonymous inode has permissions, and no type.
            Kind::Eventfd => mode & libc::S_IFMT == 0,
            Kind::Stream => matches!(
                found,
                FileType::Fifo | FileType::Socket | FileType::RegularFile
            ),
            Kind::UnixStream => found == FileType::Socket && is_unix_stream(file),
        };
        match right {
            true => Ok(()),
            false => Err(Refusal::Kind {
                expected: self.name(),
                mode,
            }),
        }?;
        if self == Kind::Memory && file_system::may_wait(file).map_err(Refusal::Examine)? {
            return Err(Refusal::FileSystem);
        }
        Ok(())
    }
}

fn is_unix_stream(socket: &File) -> bool {
    socket_domain(socket) == Ok(AddressFamily::UNIX)
        && socket_type(socket) == Ok(SocketType::STREAM)
}

impl Message {
    /// The body, which must be exactly one `T`.
    ///
    /// # Errors
    ///
    /// [`Refusal::Body`] if its length or content is wrong.
    pub fn body<T: VhostUserMsgValidator + Default>(&self) -> Result<T, Refusal> {
        part(&self.body).ok_or_else(|| self.bad_body())
    }

    /// The body, which must be a `T` and then any number of bytes.
    ///
    /// # Errors
    ///
    /// As [`Message::body`].
    pub fn head_and_rest<T: VhostUserMsgValidator + Default>(&self) -> Result<(T, &[u8]), Refusal> {
        let split = self.body.split_at_checked(size_of::<T>());
        let (head, rest) = split.ok_or_else(|| self.bad_body())?;
        Ok((part(head).ok_or_else(|| self.bad_body())?, rest))
    }

    /// Checks that there is no body.
    ///
    /// # Errors
    ///
    /// As [`Message::body`].
    pub fn no_body(&self) -> Result<(), Refusal> {
        match self.body.is_empty() {
            true => Ok(()),
            false => Err(self.bad_body()),
        }
    }

    /// The refusal of a body of a wrong length or content.
    pub fn bad_body(&self) -> Refusal {
        Refusal::Body {
            request: self.request,
            len: self.body.len(),
        }
    }

    /// Takes the only descriptor of the message, which must be of `kind`.
    ///
    /// # Errors
    ///
    /// [`Refusal::Descriptors`] or [`Refusal::Kind`]; the descriptors stay with the message.
    pub fn file(&mut self, kind: Kind) -> Result<File, Refusal> {
        self.expect_files(1)?;
        self.files.iter().try_for_each(|file| kind.check(file))?;
        self.files.pop().ok_or_else(|| self.wrong_files(1))
    }

    /// Checks the number of descriptors.
    ///
    /// # Errors
    ///
    /// [`Refusal::Descriptors`].
    pub fn expect_files(&self, expected: usize) -> Result<(), Refusal> {
        match self.files.len() == expected {
            true => Ok(()),
            false => Err(self.wrong_files(expected)),
        }
    }

    fn wrong_files(&self, expected: usize) -> Refusal {
        Refusal::Descriptors {
            request: self.request,
            expected,
            found: self.files.len(),
        }
    }
}

/// `bytes` as one `T`, if they are one.
pub fn part<T: VhostUserMsgValidator + Default>(bytes: &[u8]) -> Option<T> {
    unchecked(bytes).filter(T::is_valid)
}

/// `bytes` as one `T` of any content, if they have its length.
pub fn unchecked<T: VhostUserMsgValidator + Default>(bytes: &[u8]) -> Option<T> {
    let mut value = T::default();
    if bytes.len() != size_of::<T>() {
        return None;
    }
    value.as_mut_slice().copy_from_slice(bytes);
    Some(value)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::{UnixDatagram, UnixStream};

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    #[test]
    fn kinds_of_descriptors_are_told_apart() {
        let (pipe, _writer) = std::io::pipe().unwrap();
        let (unix, _peer) = UnixStream::pair().unwrap();
        let (datagram, _peer) = UnixDatagram::pair().unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let memory = rustix::fs::memfd_create("m", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let cases: [(OwnedFd, [bool; 4]); 8] = [
            (memory, [true, false, true, false]),
            (event, [false, true, false, false]),
            (pipe.into(), [false, false, true, false]),
            (unix.into(), [false, false, true, true]),
            (datagram.into(), [false, false, true, false]),
            (tcp.into(), [false, false, true, false]),
            (File::open("/").unwrap().into(), [false; 4]),
            (
                File::open("/proc/self/maps").unwrap().into(),
                [false, false, true, false],
            ),
        ];
        let kinds = [Kind::Memory, Kind::Eventfd, Kind::Stream, Kind::UnixStream];
        for (descriptor, expected) in cases {
            let file = File::from(descriptor);
            let found = kinds.map(|kind| kind.check(&file).is_ok());
            assert_eq!(found, expected, "{file:?}");
        }
    }
}
