//! Progress bars.

use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};

const TEMPLATE: &str = "{prefix} [{wide_bar}] {binary_bytes}/{binary_total_bytes} {eta}";

/// A bar that counts bytes on standard error, if that is a terminal, and disappears at the end. The
/// command sets its length.
pub fn bar(doing: &'static str) -> ProgressBar {
    let bar = ProgressBar::no_length()
        .with_prefix(doing)
        .with_finish(ProgressFinish::AndClear);
    match ProgressStyle::with_template(TEMPLATE) {
        Ok(style) => bar.with_style(style.progress_chars("=> ")),
        Err(_) => bar,
    }
}
