//! One vhost-user message: checks of its body and of its descriptors.
#![cfg_attr(
    not(test),
    warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)
)]

use std::fs::File;

use rustix::fs::FileType;
use rustix::net::sockopt::{socket_domain, socket_type};
use rustix::net::{AddressFamily, SocketType};
use vhost::vhost_user::message::VhostUserMsgValidator;

use super::refusal::Refusal;
use crate::io::file_system;

/// Most descriptors of a message: as many as the longest memory table has regions.
pub const MAX_DESCRIPTORS: usize = 32;

/// Most descriptors held for one message: its last part may bring [`MAX_DESCRIPTORS`] more before the
/// message is refused.
pub const MAX_HELD: usize = 2 * MAX_DESCRIPTORS;

/// A message as received.
#[derive(Debug)]
pub struct Message {
    /// Number of the request.
    pub request: u32,
    /// Whether the front-end waits for an acknowledgement (NEED_REPLY).
    pub wants_reply: bool,
    /// Body.
    pub body: Vec<u8>,
    /// Descriptors.
    pub files: Vec<File>,
}

/// Reply to a request.
#[derive(Debug)]
pub struct Reply {
    /// Body.
    pub body: Vec<u8>,
    /// Descriptor to send with it.
    pub file: Option<File>,
}

impl Reply {
    /// Reply of one number.
    pub fn number(value: u64) -> Self {
        Self::bytes(value.to_le_bytes().to_vec())
    }

    /// Reply without a descriptor.
    pub fn bytes(body: Vec<u8>) -> Self {
        Self { body, file: None }
    }
}

/// Type of file that a descriptor must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A file that can be mapped: guest memory, in-flight area, dirty log.
    Memory,
    /// An eventfd. `fstat(2)` does not distinguish it from other anonymous inodes; a write blocks on no
    /// other one.
    Eventfd,
    /// A stream of bytes.
    Stream,
    /// A Unix stream socket. With `MSG_DONTWAIT`, sending on it never blocks.
    UnixStream,
}

impl FileKind {
    fn name(self) -> &'static str {
        match self {
            FileKind::Memory => "a file that can be mapped",
            FileKind::Eventfd => "an eventfd",
            FileKind::Stream => "a pipe, socket or regular file",
            FileKind::UnixStream => "a Unix stream socket",
        }
    }

    /// Checks that `file` is of this type.
    ///
    /// # Errors
    ///
    /// [`Refusal::FileKind`] if it is not; [`Refusal::FileSystem`] if it is to be mapped, and page faults of
    /// its file system may wait for another process.
    pub fn check(self, file: &File) -> Result<(), Refusal> {
        let mode = file_system::mode(file).map_err(Refusal::Examine)?;
        let found = FileType::from_raw_mode(mode);
        let right = match self {
            FileKind::Memory => matches!(found, FileType::RegularFile | FileType::CharacterDevice),
            // An anonymous inode has permissions, and no type.
            FileKind::Eventfd => mode & libc::S_IFMT == 0,
            FileKind::Stream => matches!(
                found,
                FileType::Fifo | FileType::Socket | FileType::RegularFile
            ),
            FileKind::UnixStream => found == FileType::Socket && is_unix_stream(file),
        };
        match right {
            true => Ok(()),
            false => Err(Refusal::FileKind {
                expected: self.name(),
                mode,
            }),
        }?;
        if self == FileKind::Memory && file_system::may_wait(file).map_err(Refusal::Examine)? {
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
    /// Parses the body as one `T`.
    ///
    /// # Errors
    ///
    /// [`Refusal::Body`] if its length or content is wrong.
    pub fn body<T: VhostUserMsgValidator + Default>(&self) -> Result<T, Refusal> {
        parse(&self.body).ok_or_else(|| self.bad_body())
    }

    /// Parses the body as a `T` and any number of bytes behind it.
    ///
    /// # Errors
    ///
    /// [`Refusal::Body`] if the body is too short for a `T`, or its content is wrong.
    pub fn head_and_rest<T: VhostUserMsgValidator + Default>(&self) -> Result<(T, &[u8]), Refusal> {
        let split = self.body.split_at_checked(size_of::<T>());
        let (head, rest) = split.ok_or_else(|| self.bad_body())?;
        Ok((parse(head).ok_or_else(|| self.bad_body())?, rest))
    }

    /// Checks that the body is empty.
    ///
    /// # Errors
    ///
    /// [`Refusal::Body`] if it is not.
    pub fn no_body(&self) -> Result<(), Refusal> {
        match self.body.is_empty() {
            true => Ok(()),
            false => Err(self.bad_body()),
        }
    }

    /// Refusal of a body of a wrong length or content.
    pub fn bad_body(&self) -> Refusal {
        Refusal::Body {
            request: self.request,
            len: self.body.len(),
        }
    }

    /// Takes the only descriptor of the message, which must be of type `kind`.
    ///
    /// # Errors
    ///
    /// [`Refusal::Descriptors`] if there is not exactly one, and those of [`FileKind::check`]; the
    /// descriptors stay in the message.
    pub fn file(&mut self, kind: FileKind) -> Result<File, Refusal> {
        self.expect_files(1)?;
        self.files.iter().try_for_each(|file| kind.check(file))?;
        self.files.pop().ok_or_else(|| self.wrong_files(1))
    }

    /// Checks the number of descriptors.
    ///
    /// # Errors
    ///
    /// [`Refusal::Descriptors`] if it is another.
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

/// Parses `bytes` as one `T` with valid content.
pub fn parse<T: VhostUserMsgValidator + Default>(bytes: &[u8]) -> Option<T> {
    parse_unchecked(bytes).filter(T::is_valid)
}

/// Parses `bytes` as one `T` with any content.
pub fn parse_unchecked<T: VhostUserMsgValidator + Default>(bytes: &[u8]) -> Option<T> {
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
        let kinds = [
            FileKind::Memory,
            FileKind::Eventfd,
            FileKind::Stream,
            FileKind::UnixStream,
        ];
        for (descriptor, expected) in cases {
            let file = File::from(descriptor);
            let found = kinds.map(|kind| kind.check(&file).is_ok());
            assert_eq!(found, expected, "{file:?}");
        }
    }
}
