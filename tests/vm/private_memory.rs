//! A guest with memory that its VMM does not share with the daemon, as a DIMM added later may be:
//! requests with data there fail, and the guest never takes what lies there for the disk's.

use tempfile::tempdir;

use crate::{IMAGE, assert_read, content_of, tiny};
use common::daemon::Daemon;
use common::golden;

#[test]
fn requests_with_data_in_private_memory_fail() {
    let golden = golden::find(IMAGE);
    let content = content_of(&golden);
    let dir = tempdir().unwrap();
    let upper = dir.path().join("upper");
    let folder = upper.to_str().expect("UTF-8");
    for (writable, options) in [(false, &[][..]), (true, &["--upper-auto", folder])] {
        let daemon = Daemon::with(&golden.layers, options);
        let order = format!("mib=2 private={}", tiny::SHARED);
        let report = tiny::run(dir.path(), &daemon.socket(), &order);
        let mut requests = vec!["read", "half_read"];
        if writable {
            requests.extend(["write", "half_write"]);
        }
        for request in requests {
            assert_eq!(report.value("private", request), "1", "status of {request}");
        }
        assert_eq!(report.value("private", "changed"), "0");
        assert_eq!(report.value("private", "used_len"), "1");
        // Nothing was written, and the queue goes on.
        assert_read(&report, &content[..2 << 20]);
    }
}
