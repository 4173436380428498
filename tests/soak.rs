//! The soak of `contrib/stress`, for a moment.

mod common;
#[path = "../contrib/stress/soak/mod.rs"]
mod soak;

use std::time::Duration;

#[test]
fn twenty_seconds() {
    let report = soak::run(Duration::from_secs(20), 7);
    assert!(report.is_good(), "{report}");
}
