//! The query of a request.

use crate::node::error::{Code, Failure};

/// Keys and values of a query, decoded.
#[derive(Debug, Default)]
pub struct Query(Vec<(String, String)>);

impl Query {
    /// Decodes a query that has only keys of `known`.
    ///
    /// # Errors
    /// [`Code::UnknownField`] for another key: a misspelled `force` or `validate` must not be ignored.
    pub fn parse(text: &str, known: &[&str]) -> Result<Self, Failure> {
        let mut pairs = Vec::new();
        for pair in text.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let key = decode_form(key);
            if !known.contains(&key.as_str()) {
                let text = match known.is_empty() {
                    true => format!("unknown parameter {key:?}; the request takes none"),
                    false => format!("unknown parameter {key:?}; expected {}", known.join(", ")),
                };
                return Err(Failure::new(Code::UnknownField, text));
            }
            pairs.push((key, decode_form(value)));
        }
        Ok(Self(pairs))
    }

    /// Returns all values of a key.
    pub fn all<'q, 'k>(&'q self, key: &'k str) -> impl Iterator<Item = &'q str> + use<'q, 'k> {
        let pairs = self.0.iter().filter(move |(name, _)| name == key);
        pairs.map(|(_, value)| value.as_str())
    }

    /// Returns the value of a key.
    ///
    /// # Errors
    /// [`Code::BadRequest`] if the key occurs twice.
    pub fn text(&self, key: &str) -> Result<Option<&str>, Failure> {
        let mut values = self.all(key);
        match (values.next(), values.next()) {
            (value, None) => Ok(value),
            (_, Some(_)) => {
                let text = format!("parameter {key} occurs twice");
                Err(Failure::new(Code::BadRequest, text))
            }
        }
    }

    /// Returns whether a key is `true`; it is not if it is missing.
    ///
    /// # Errors
    /// [`Code::BadRequest`] for another value than `true` or `false`.
    pub fn flag(&self, key: &str) -> Result<bool, Failure> {
        match self.text(key)? {
            None | Some("false") => Ok(false),
            Some("true") => Ok(true),
            Some(_) => Err(Failure::new(
                Code::BadRequest,
                format!("parameter {key}: expected true or false"),
            )),
        }
    }

    /// Returns the number that a key has.
    ///
    /// # Errors
    /// [`Code::BadRequest`] for a value that is no number.
    pub fn number(&self, key: &str) -> Result<Option<u64>, Failure> {
        let number = self.text(key)?.map(str::parse).transpose();
        number.map_err(|_| {
            let text = format!("parameter {key}: expected a whole number");
            Failure::new(Code::BadRequest, text)
        })
    }
}

/// Decodes a part of a query, in which clients write a space as `+`.
fn decode_form(text: &str) -> String {
    decode(&text.replace('+', " "))
}

/// Replaces each `%XX` by its byte, once. What is not UTF-8 then is no valid value.
pub fn decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let hex = tail
            .get(..2)
            .filter(|hex| *first == b'%' && hex.iter().all(u8::is_ascii_hexdigit))
            .and_then(|hex| std::str::from_utf8(hex).ok());
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_decoded_once() {
        let query = Query::parse("label=a%3Db+c%252B&label=%2B&wait=7&&", &["label", "wait"]);
        let query = query.unwrap();
        assert_eq!(query.all("label").collect::<Vec<_>>(), ["a=b c%2B", "+"]);
        assert_eq!(query.number("wait").unwrap(), Some(7));
        assert_eq!(query.number("after").unwrap(), None);
        assert_eq!(decode("%+1%zz%"), "%+1%zz%");
    }

    #[test]
    fn a_wrong_parameter_is_not_ignored() {
        for text in [
            "forced=true",
            "force",
            "force=1",
            "force=True",
            "force=true&force=true",
        ] {
            let flag = Query::parse(text, &["force"]).and_then(|query| query.flag("force"));
            assert!(flag.is_err(), "{text}");
        }
        for text in ["wait=-1", "wait=1.5", "wait=", "wait=18446744073709551616"] {
            let number = Query::parse(text, &["wait"]).and_then(|query| query.number("wait"));
            assert_eq!(number.unwrap_err().code, Code::BadRequest, "{text}");
        }
        let unknown = Query::parse("x=1", &[]).unwrap_err();
        assert_eq!(unknown.code, Code::UnknownField);
    }
}
