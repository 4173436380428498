//! The programs under test, and the build directory they are in.

use std::env;
use std::fs;
use std::path::PathBuf;

/// The directory of the programs of this build, as in `target/debug`.
///
/// Tests and benchmarks lie in a directory `deps` in it.
fn directory() -> PathBuf {
    let own = env::current_exe().expect("path of the test");
    let directory = own.ancestors().nth(2).expect("a directory above `deps`");
    directory.to_owned()
}

/// Path of a program of this package, which `cargo test` and `cargo bench` build with the tests.
pub fn path(name: &str) -> PathBuf {
    let path = directory().join(name);
    assert!(
        path.is_file(),
        "{}: no such program; run the tests by `cargo test`, which builds it",
        path.display()
    );
    path
}

/// The directory `tmp` of the build, where files may stay from one run to the next: the
/// `CARGO_TARGET_TMPDIR` of the tests, which a library is not told of.
pub fn temporary() -> PathBuf {
    let directory = directory();
    let tmp = directory.ancestors().nth(1).expect("a build directory");
    let tmp = tmp.join("tmp");
    fs::create_dir_all(&tmp).expect("a directory for temporary files");
    tmp
}
