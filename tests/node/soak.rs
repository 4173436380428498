//! The soak of `contrib/stress/node`, for a moment: nodes and disk processes end under guests that read and write.

#[path = "../../contrib/stress/node/soak.rs"]
mod load;

use std::time::Duration;

#[test]
fn guests_notice_no_more_than_a_pause() {
    let summary = load::run(Duration::from_secs(15), 6, 7);
    assert!(summary.kinds() == 5, "{summary}");
}
