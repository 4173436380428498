//! `Content-Range`: the range of bytes in an answer, and their total (RFC 9110, 14.4).

/// The value of a `Content-Range` header in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContentRange {
    /// `bytes FIRST-LAST/TOTAL`, of a 206 answer.
    Part {
        /// First byte of the body.
        first: u64,
        /// Last byte of the body, not before the first.
        last: u64,
        /// Bytes of the whole, more than `last`; absent for `*`.
        total: Option<u64>,
    },
    /// `bytes */TOTAL`, of a 416 answer.
    Unsatisfied {
        /// Bytes of the whole.
        total: u64,
    },
}

impl ContentRange {
    /// Reads a header's value; `None` if it is malformed, contradicts itself or counts no bytes.
    pub fn parse(text: &str) -> Option<ContentRange> {
        let (unit, rest) = text.trim().split_once(' ')?;
        if !unit.eq_ignore_ascii_case("bytes") {
            return None;
        }
        let (range, total) = rest.trim_start().split_once('/')?;
        if range == "*" {
            let total = number(total)?;
            return Some(ContentRange::Unsatisfied { total });
        }
        let (first, last) = range.split_once('-')?;
        let (first, last) = (number(first)?, number(last)?);
        let total = match total {
            "*" => None,
            total => Some(number(total)?),
        };
        // A length of 2^64 does not fit.
        let in_order = first <= last && last < u64::MAX;
        let in_total = total.is_none_or(|total| last < total);
        (in_order && in_total).then_some(ContentRange::Part { first, last, total })
    }
}

/// Digits only: `u64::from_str` would take a sign.
fn number(text: &str) -> Option<u64> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read() {
        let part = |first, last, total| Some(ContentRange::Part { first, last, total });
        for (text, expected) in [
            ("bytes 0-9/100", part(0, 9, Some(100))),
            ("Bytes 5-5/6", part(5, 5, Some(6))),
            ("bytes 0-9/*", part(0, 9, None)),
            (
                "bytes */100",
                Some(ContentRange::Unsatisfied { total: 100 }),
            ),
        ] {
            assert_eq!(ContentRange::parse(text), expected, "{text}");
        }
    }

    #[test]
    fn contradictions_and_other_texts_are_refused() {
        for text in [
            "",
            "bytes",
            "bytes ",
            "bytes 0-9",
            "bytes 9-0/100",
            "bytes 0-9/9",
            "bytes 0-9/5",
            "bytes -9/100",
            "bytes 0-/100",
            "bytes +0-9/100",
            "bytes 0-9/+100",
            "bytes */*",
            "items 0-9/100",
            "bytes 0-9/100,10-19/100",
            "bytes 0 - 9/100",
            "bytes 0-9/0x64",
            "bytes 0-18446744073709551615/*",
            "bytes 0-18446744073709551616/*",
            "bytes 99999999999999999999-99999999999999999999/*",
            "bytes ０-９/100",
        ] {
            assert_eq!(ContentRange::parse(text), None, "{text}");
        }
    }
}
