//! SHA-256 digests in the notation of registries: `sha256:` and 64 hexadecimal digits.

use std::fmt;
use std::str::FromStr;

use sha2::{Digest as _, Sha256};

const PREFIX: &str = "sha256:";

/// Text that is not a digest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected a digest (sha256: and 64 lower-case hexadecimal digits), found {found:?}")]
pub struct DigestError {
    /// The text, cut after 100 characters.
    pub found: String,
}

/// SHA-256 digest of a blob or manifest.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    /// Creates a digest from its bytes.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Computes the digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        let mut hasher = Hasher::new();
        hasher.update(bytes);
        hasher.finish()
    }

    /// The 32 bytes of the digest.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Returns the digits without `sha256:`, for use as a file name.
    pub fn hex(&self) -> String {
        let digit = |value: u8| char::from_digit(u32::from(value & 15), 16);
        let digits = self
            .0
            .iter()
            .flat_map(|byte| [digit(byte >> 4), digit(*byte)]);
        digits.flatten().collect()
    }

    /// Parses the 64 digits that [`Digest::hex`] returns.
    pub fn from_hex(text: &str) -> Option<Self> {
        let value = |digit: u8| {
            let digit = Some(digit).filter(|digit| !digit.is_ascii_uppercase())?;
            u8::try_from(char::from(digit).to_digit(16)?).ok()
        };
        let digits: &[u8; 64] = text.as_bytes().try_into().ok()?;
        let mut bytes = [0; 32];
        let (pairs, _) = digits.as_chunks::<2>();
        for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
            *byte = value(*high)? << 4 | value(*low)?;
        }
        Some(Self(bytes))
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        let digits = text.strip_prefix(PREFIX);
        digits.and_then(Self::from_hex).ok_or_else(|| DigestError {
            found: text.chars().take(100).collect(),
        })
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Computes a digest incrementally.
#[derive(Clone, Debug, Default)]
pub struct Hasher(Sha256);

impl Hasher {
    /// Creates a hasher without bytes.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends `bytes`.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// Returns the digest of all bytes that were appended.
    pub fn finish(self) -> Digest {
        Digest(self.0.finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Example B.1 of FIPS 180-2.
    const ABC: &str = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn known_value_in_one_and_in_two_parts() {
        assert_eq!(Digest::of(b"abc").to_string(), ABC);
        let mut hasher = Hasher::new();
        hasher.update(b"a");
        hasher.update(b"bc");
        assert_eq!(hasher.finish().to_string(), ABC);
    }

    #[test]
    fn only_the_canonical_text_is_parsed() {
        let digest: Digest = ABC.parse().unwrap();
        assert_eq!(digest, Digest::of(b"abc"));
        assert_eq!(Digest::from_hex(&digest.hex()), Some(digest));
        let (short, long) = (&ABC[..70], format!("{ABC}0"));
        let upper = ABC.replace('b', "B");
        let escape = format!("sha256:../{}", &ABC[10..]);
        let other = ABC.replace("sha256", "sha512");
        for text in ["", "sha256:", short, &long, &upper, &escape, &other] {
            let error = text.parse::<Digest>().unwrap_err();
            assert_eq!(error.found, text);
        }
        let error = "x".repeat(5000).parse::<Digest>().unwrap_err();
        assert_eq!(error.found.len(), 100);
    }
}
