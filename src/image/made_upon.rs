//! Record of the stack that a layer was made upon: the last line of the layer's commit message.
//!
//! Other tools ignore it. It identifies stacks whose layers have no uuids, and has the size of the disk.

use super::identity::StackId;

/// Bytes of the commit message field.
const FIELD: usize = 256;

/// Start of a record.
const TAG: &str = "made upon ";

/// The stack that a layer was made upon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MadeUpon {
    /// Identity of the stack.
    pub stack: StackId,
    /// Size of its disk in bytes.
    pub size: u64,
}

impl MadeUpon {
    /// Splits a commit message into its text and the record.
    pub fn split(message: &[u8]) -> (&[u8], Option<Self>) {
        let start = message.iter().rposition(|byte| *byte == b'\n');
        let (text, last) = match start {
            // Without the line break.
            Some(at) => (&message[..at], &message[at + 1..]),
            None => (&[][..], message),
        };
        match Self::parse(last) {
            Some(record) => (text, Some(record)),
            None => (message, None),
        }
    }

    fn parse(line: &[u8]) -> Option<Self> {
        let text = str::from_utf8(line).ok()?.strip_prefix(TAG)?;
        let (stack, size) = text.strip_suffix(" bytes")?.split_once(", ")?;
        let digits = size.bytes().all(|byte| byte.is_ascii_digit());
        Some(Self {
            stack: StackId::parse(stack)?,
            size: size.parse().ok().filter(|_| digits)?,
        })
    }

    fn line(self) -> String {
        let Self { stack, size } = self;
        format!("{TAG}{stack}, {size} bytes")
    }

    /// Returns a commit message with this text and record; `None` if both do not fit.
    pub fn message(self, text: &[u8]) -> Option<Vec<u8>> {
        if text.len() > self.max_text() {
            return None;
        }
        let mut message = text.to_vec();
        if !text.is_empty() {
            message.push(b'\n');
        }
        message.extend(self.line().bytes());
        Some(message)
    }

    /// Most bytes of text that fit beside the record.
    pub fn max_text(self) -> usize {
        FIELD - self.line().len() - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_holds_a_text_and_a_record() {
        let record = MadeUpon {
            stack: StackId::EMPTY,
            size: u64::MAX,
        };
        let long = "m".repeat(record.max_text());
        for text in ["", "text", "two\nlines\n", &long] {
            let message = record.message(text.as_bytes()).unwrap();
            assert!(message.len() <= FIELD);
            assert_eq!(MadeUpon::split(&message), (text.as_bytes(), Some(record)));
        }
        assert_eq!(record.message(&vec![b'm'; record.max_text() + 1]), None);
        for other in [
            "",
            "\n",
            "made upon",
            "made upon a Friday, 9 bytes",
            "made upon cbf29ce484222325, +9 bytes",
            "made upon cbf29ce484222325, 9 bytes\n",
            "made upon cbf29ce48422232, 9 bytes",
        ] {
            assert_eq!(MadeUpon::split(other.as_bytes()), (other.as_bytes(), None));
        }
    }
}
