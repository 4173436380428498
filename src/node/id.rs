//! Names of disks.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest name in bytes.
pub const MAX_ID_LEN: usize = 64;

/// Name of a disk: `[A-Za-z0-9][A-Za-z0-9._-]{0,63}`. It is safe as a file name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DiskId(String);

/// A text that is not the name of a disk.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid disk id {0:?}; expected [A-Za-z0-9][A-Za-z0-9._-]{{0,63}}")]
pub struct InvalidId(String);

impl DiskId {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for DiskId {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let starts = text
            .bytes()
            .next()
            .is_some_and(|byte| byte.is_ascii_alphanumeric());
        let valid = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        match starts && text.len() <= MAX_ID_LEN && text.bytes().all(valid) {
            true => Ok(Self(text.to_owned())),
            // Hostile text is quoted only up to the length of a name.
            false => Err(InvalidId(text.chars().take(MAX_ID_LEN + 1).collect())),
        }
    }
}

impl TryFrom<String> for DiskId {
    type Error = InvalidId;

    fn try_from(text: String) -> Result<Self, InvalidId> {
        text.parse()
    }
}

impl From<DiskId> for String {
    fn from(id: DiskId) -> Self {
        id.0
    }
}

impl fmt::Display for DiskId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        for good in ["a", "vm7-root", "A.b_c-9", &"x".repeat(64)] {
            assert_eq!(good.parse::<DiskId>().unwrap().as_str(), good);
        }
        for bad in [
            "",
            ".",
            "..",
            "-a",
            ".a",
            "a/b",
            "a b",
            "ä",
            "a\0",
            "%2e",
            &"x".repeat(65),
        ] {
            assert!(bad.parse::<DiskId>().is_err(), "{bad:?}");
        }
    }
}
