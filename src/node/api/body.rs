//! The body of a request.

use std::time::Duration;

use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::{Bytes, Incoming};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::node::error::{Code, Failure};

/// Longest body in bytes: 4094 layer paths of some length.
const MAX_BODY: usize = 1 << 20;

/// How long a body may take to arrive.
const BODY_LIMIT: Duration = Duration::from_secs(10);

/// Receives a body. That of a request which is refused is received too: the system resets a connection that is closed
/// with unread bytes, and the client may miss the answer.
///
/// # Errors
/// [`Code::TooLarge`], or [`Code::BadRequest`] if the body does not arrive.
pub async fn receive(body: Incoming) -> Result<Bytes, Failure> {
    let limited = Limited::new(body, MAX_BODY);
    let collected = tokio::time::timeout(BODY_LIMIT, limited.collect()).await;
    let collected =
        collected.map_err(|_| Failure::new(Code::BadRequest, "the body did not arrive in time"))?;
    let bytes = collected.map_err(|error| match error.is::<LengthLimitError>() {
        true => Failure::new(
            Code::TooLarge,
            format!("body: expected at most {MAX_BODY} bytes"),
        ),
        false => Failure::new(Code::BadRequest, format!("body: {error}")),
    })?;
    Ok(bytes.to_bytes())
}

/// Reads a body that is a JSON object; its declared type is ignored.
///
/// # Errors
/// [`Code::UnknownField`], or [`Code::BadRequest`] for another fault.
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Failure> {
    // A list is refused, although `serde` takes its values for the fields of a struct in order.
    serde_json::from_slice::<Map<String, Value>>(bytes)
        .and_then(|object| serde_json::from_value(Value::Object(object)))
        .map_err(|error| {
            let error = error.to_string();
            let code = match error.starts_with("unknown field") {
                true => Code::UnknownField,
                false => Code::BadRequest,
            };
            Failure::new(code, format!("body: {error}"))
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::spec::DiskSpec;

    #[test]
    fn faults_of_a_body_have_codes() {
        for (text, code) in [
            (r#"{"limit":{}}"#, Code::UnknownField),
            (
                r#"{"layers":["/a"],"limits":{"iops":1}}"#,
                Code::UnknownField,
            ),
            (r#"{"layers":5}"#, Code::BadRequest),
            (r#"["/a"]"#, Code::BadRequest),
            ("", Code::BadRequest),
            ("{\"layers\":[\"\u{0}\"]}", Code::BadRequest),
        ] {
            assert_eq!(
                parse::<DiskSpec>(text.as_bytes()).unwrap_err().code,
                code,
                "{text}"
            );
        }
        parse::<DiskSpec>(br#"{"layers":["/a"]}"#).unwrap();
    }
}
