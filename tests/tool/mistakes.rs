//! Mistakes on purpose: `mistakes.md` holds what each program says of them. `TRYCMD=overwrite` writes
//! the file anew.

use std::path::Path;
use std::time::Duration;

#[test]
fn mistakes_are_explained() {
    let cases = trycmd::TestCases::new();
    for (name, program) in [
        ("ovbd", env!("CARGO_BIN_EXE_ovbd")),
        ("ovbd-node", env!("CARGO_BIN_EXE_ovbd-node")),
        ("ovbd-vhost", env!("CARGO_BIN_EXE_ovbd-vhost")),
    ] {
        cases.register_bin(name, Path::new(program));
    }
    cases.timeout(Duration::from_secs(60));
    cases.case("tests/tool/mistakes.md");
}
