//! Malformed answers: if a server gives no others for a while, they end a start as a refusal does.

use std::time::{Duration, Instant};

use super::origin::Failure;

/// Malformed answers for so long are taken for lasting.
const PATIENCE: Duration = Duration::from_secs(3);

/// Start of the malformed answers of a server that no other result has followed.
#[derive(Debug, Default)]
pub(super) struct MalformedAnswers {
    since: Option<Instant>,
}

impl MalformedAnswers {
    /// Notes a failure. Returns it, as one that ends a start if there were malformed answers only for a
    /// while.
    pub(super) fn judge(&mut self, failure: &Failure, now: Instant) -> Failure {
        let mut judged = failure.clone();
        if failure.malformed {
            let since = *self.since.get_or_insert(now);
            judged.ends_start |= now.duration_since(since) >= PATIENCE;
        } else {
            self.since = None;
        }
        judged
    }

    /// Notes a good answer.
    pub(super) fn end(&mut self) {
        self.since = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::FetchErrorKind;

    #[test]
    fn only_malformed_answers_in_a_row_end_a_start() {
        let passing = Failure::passing(FetchErrorKind::Unexpected, "204");
        let malformed = Failure {
            malformed: true,
            ..passing.clone()
        };
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut answers = MalformedAnswers::default();
        assert!(!answers.judge(&malformed, at(0)).ends_start);
        assert!(!answers.judge(&malformed, at(2)).ends_start);
        assert!(answers.judge(&malformed, at(3)).ends_start);
        assert!(!answers.judge(&passing, at(4)).ends_start);
        assert!(!answers.judge(&malformed, at(5)).ends_start);
        answers.end();
        assert!(!answers.judge(&malformed, at(9)).ends_start);
        assert!(answers.judge(&malformed, at(12)).ends_start);
    }
}
