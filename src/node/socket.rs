//! Listening unix sockets with a mode and an owner, which they have before they have their names.

use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::daemon::sandbox::privileges::{IdentityError, group_id, user_id};

/// Longest name of a user or group; the limit of the usual tools.
const MAX_NAME: usize = 32;

/// Permissions of a socket. In JSON, an octal number as text: `"0660"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SocketMode(u32);

/// Text that names no permissions.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected an octal number from 0 to 777, as \"0660\"")]
pub struct InvalidMode;

impl SocketMode {
    /// Returns the permission bits.
    pub fn bits(self) -> u32 {
        self.0
    }
}

impl Default for SocketMode {
    /// Read and write for the owner.
    fn default() -> Self {
        Self(0o600)
    }
}

impl FromStr for SocketMode {
    type Err = InvalidMode;

    fn from_str(text: &str) -> Result<Self, InvalidMode> {
        let digits =
            (1..=4).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
        let bits = u32::from_str_radix(text, 8).ok().filter(|_| digits);
        bits.filter(|bits| *bits <= 0o777)
            .map(Self)
            .ok_or(InvalidMode)
    }
}

impl TryFrom<String> for SocketMode {
    type Error = InvalidMode;

    fn try_from(text: String) -> Result<Self, InvalidMode> {
        text.parse()
    }
}

impl From<SocketMode> for String {
    fn from(mode: SocketMode) -> Self {
        format!("{:04o}", mode.0)
    }
}

/// User and group of a socket, by names or numbers: `USER`, `USER:GROUP` or `:GROUP`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SocketOwner {
    user: Option<String>,
    group: Option<String>,
}

/// Text that names no owner.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "expected USER, USER:GROUP or :GROUP, each a number or a name of at most {MAX_NAME} characters"
)]
pub struct InvalidOwner;

impl SocketOwner {
    /// Finds the numbers of the user and of the group; `None` for the part that stays as it is.
    ///
    /// # Errors
    /// [`IdentityError::Unknown`] for a name that the host does not list, [`IdentityError::List`] if its lists cannot be
    /// read.
    pub fn numbers(&self) -> Result<(Option<u32>, Option<u32>), IdentityError> {
        let user = self.user.as_deref().map(user_id).transpose()?;
        let group = self.group.as_deref().map(group_id).transpose()?;
        Ok((user, group))
    }
}

impl FromStr for SocketOwner {
    type Err = InvalidOwner;

    fn from_str(text: &str) -> Result<Self, InvalidOwner> {
        let valid = |name: &str| {
            (1..=MAX_NAME).contains(&name.len())
                && name
                    .bytes()
                    .all(|byte| byte.is_ascii_graphic() && byte != b':')
        };
        let part = |name: &str| valid(name).then(|| name.to_owned()).ok_or(InvalidOwner);
        let (user, group) = match text.split_once(':') {
            None => (Some(part(text)?), None),
            Some(("", group)) => (None, Some(part(group)?)),
            Some((user, group)) => (Some(part(user)?), Some(part(group)?)),
        };
        Ok(Self { user, group })
    }
}

impl TryFrom<String> for SocketOwner {
    type Error = InvalidOwner;

    fn try_from(text: String) -> Result<Self, InvalidOwner> {
        text.parse()
    }
}

impl From<SocketOwner> for String {
    fn from(owner: SocketOwner) -> Self {
        owner.to_string()
    }
}

impl fmt::Display for SocketOwner {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.user.as_deref().unwrap_or_default())?;
        match &self.group {
            Some(group) => write!(formatter, ":{group}"),
            None => Ok(()),
        }
    }
}

/// A socket cannot be bound.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The socket cannot be made, protected or renamed.
    #[error(transparent)]
    Socket(#[from] io::Error),
    /// The host does not know the owner.
    #[error(transparent)]
    Unknown(#[from] IdentityError),
    /// The socket cannot be given to its owner.
    #[error(
        "cannot give the socket to {owner}: {source}; name a group of the node's user, or run the node as root"
    )]
    Owner {
        /// The owner.
        owner: SocketOwner,
        /// Error of the system.
        source: io::Error,
    },
}

/// Binds `path`, where no file is.
///
/// # Errors
/// A [`BindError`]; then nothing is left at the path.
pub fn bind(
    path: &Path,
    mode: SocketMode,
    owner: Option<&SocketOwner>,
) -> Result<UnixListener, BindError> {
    let hidden = hidden(path);
    // The leftover of a node that was killed meanwhile.
    let _ = fs::remove_file(&hidden);
    let listener = UnixListener::bind(&hidden)?;
    let named = protect(&hidden, mode, owner).and_then(|()| Ok(fs::rename(&hidden, path)?));
    if let Err(error) = named {
        // The error that is reported matters more than this one.
        let _ = fs::remove_file(&hidden);
        return Err(error);
    }
    Ok(listener)
}

fn protect(path: &Path, mode: SocketMode, owner: Option<&SocketOwner>) -> Result<(), BindError> {
    if let Some(owner) = owner {
        let (user, group) = owner.numbers()?;
        chown(path, user, group).map_err(|source| BindError::Owner {
            owner: owner.clone(),
            source,
        })?;
    }
    Ok(fs::set_permissions(
        path,
        fs::Permissions::from_mode(mode.bits()),
    )?)
}

/// Name of a socket until its mode and its owner are right.
pub fn hidden(socket: &Path) -> PathBuf {
    socket.with_extension("new")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_octal() {
        for (text, bits) in [("0600", 0o600), ("660", 0o660), ("0", 0), ("777", 0o777)] {
            assert_eq!(text.parse(), Ok(SocketMode(bits)), "{text}");
        }
        for text in ["", "1777", "888", "+600", "0o600", "00600", "6 0"] {
            assert_eq!(text.parse::<SocketMode>(), Err(InvalidMode), "{text}");
        }
        assert_eq!(String::from(SocketMode::default()), "0600");
    }

    #[test]
    fn owners_are_users_and_groups() {
        for text in ["root", "root:root", ":0", "4000000000:4000000001"] {
            let owner: SocketOwner = text.parse().unwrap();
            assert_eq!(owner.to_string(), text);
            owner.numbers().unwrap();
        }
        let owner: SocketOwner = "0:7".parse().unwrap();
        assert_eq!(owner.numbers().unwrap(), (Some(0), Some(7)));
        let unknown: SocketOwner = ":no-such-group".parse().unwrap();
        assert!(unknown.numbers().is_err());
        for text in ["", ":", "root:", "a b", "a\0", "a:b:c", &"x".repeat(33)] {
            assert_eq!(text.parse::<SocketOwner>(), Err(InvalidOwner), "{text:?}");
        }
    }
}
