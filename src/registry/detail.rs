//! Text of a registry's error response, for log lines and error messages.

use serde::Deserialize;

use super::http::Answer;

/// Longest body that is looked at, in bytes.
const MAX_BODY: u64 = 8 << 10;

/// Longest text that is quoted, in characters.
const MAX_TEXT: usize = 200;

/// The code and message of the answer's first error; empty if it has none.
pub(super) fn of(answer: Answer) -> String {
    text(&answer.start_of_body(MAX_BODY))
}

fn text(body: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Reply {
        errors: Vec<Item>,
    }
    #[derive(Deserialize)]
    struct Item {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let reply: Option<Reply> = serde_json::from_slice(body).ok();
    let first = reply.and_then(|reply| reply.errors.into_iter().next());
    let Some(Item { code, message }) = first else {
        return String::new();
    };
    let text = format!("{code}: {message}");
    let shown = text.trim_matches([':', ' ']).chars().take(MAX_TEXT);
    shown
        .map(|char| if char.is_control() { ' ' } else { char })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_error_is_quoted() {
        for (body, expected) in [
            (
                r#"{"errors":[{"code":"DENIED","message":"no"},{"code":"X"}]}"#,
                "DENIED: no",
            ),
            (r#"{"errors":[{"code":"DENIED"}]}"#, "DENIED"),
            (r#"{"errors":[{"message":"a\nb\u001b[31m"}]}"#, "a b [31m"),
            (r#"{"errors":[]}"#, ""),
            (r#"{"errors":5}"#, ""),
            ("<html>", ""),
            ("", ""),
        ] {
            assert_eq!(text(body.as_bytes()), expected, "{body}");
        }
        let long = format!(r#"{{"errors":[{{"message":"{}"}}]}}"#, "é".repeat(5000));
        assert_eq!(text(long.as_bytes()).chars().count(), MAX_TEXT);
    }
}
