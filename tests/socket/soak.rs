//! The soak of `contrib/stress`, for a moment.

#[path = "../../contrib/stress/soak/mod.rs"]
mod load;

use std::time::Duration;

#[test]
fn twenty_seconds() {
    let report = load::run(Duration::from_secs(20), 7);
    assert!(report.is_good(), "{report}");
}
