//! Answers.

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::{CONTENT_TYPE, ETAG, HeaderValue, RETRY_AFTER};
use hyper::{Response, StatusCode};
use serde_json::Value;

use crate::node::error::Failure;

/// An answer of this server.
pub type Reply = Response<Full<Bytes>>;

/// JSON with a status.
pub fn json(status: StatusCode, body: &Value) -> Reply {
    text(status, "application/json", body.to_string())
}

/// JSON with status 200.
pub fn ok(body: &Value) -> Reply {
    json(StatusCode::OK, body)
}

/// The description of a disk, with its generation as entity tag.
pub fn disk(status: StatusCode, view: &Value) -> Reply {
    let mut reply = json(status, view);
    let generation = view.get("generation").and_then(Value::as_u64);
    let tag = generation.map(|generation| HeaderValue::from_str(&format!("\"{generation}\"")));
    if let Some(Ok(tag)) = tag {
        reply.headers_mut().insert(ETAG, tag);
    }
    reply
}

/// Returns the entity tag of an answer.
pub fn generation(reply: &Reply) -> Option<&str> {
    let tag = reply.headers().get(ETAG);
    tag.and_then(|tag| tag.to_str().ok())
}

/// Text of a type with a status.
pub fn text(status: StatusCode, kind: &'static str, body: String) -> Reply {
    let mut reply = Response::new(Full::new(Bytes::from(body)));
    *reply.status_mut() = status;
    reply
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    reply
}

/// 204.
pub fn empty() -> Reply {
    let mut reply = Response::new(Full::default());
    *reply.status_mut() = StatusCode::NO_CONTENT;
    reply
}

/// The answer of a request that failed.
pub fn failure(failure: &Failure) -> Reply {
    let mut reply = json(failure.code.status(), &failure.body());
    if reply.status() == StatusCode::SERVICE_UNAVAILABLE {
        reply
            .headers_mut()
            .insert(RETRY_AFTER, HeaderValue::from_static("1"));
    }
    reply
}
