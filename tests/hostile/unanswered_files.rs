//! Files of a FUSE file system whose server does not answer, in place of guest memory, an in-flight area or a
//! log. They are refused without a call that waits; to close one waits, and holds nothing up.

use std::fs::File;
use std::os::fd::AsRawFd;

use common::disk::Disk;
use common::raw::{NEED_REPLY, Raw};
use common::recorder::Recorder;
use rustix::io::Errno;
use vhost::vhost_user::message::FrontendReq;

const SIZE: u64 = 16 << 20;

fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_le_bytes()).collect()
}

fn content() -> Vec<u8> {
    vec![0; SIZE as usize]
}

#[test]
fn files_whose_server_does_not_answer_hold_nothing_up() {
    assert_refused(&Recorder::mount_with("f", content()));
}

/// FUSE on a block device (`fuseblk`) has the number of the device, as ext4 has.
#[test]
fn files_of_fuse_on_a_block_device_are_no_others() {
    match Recorder::mount_on_device("f", content()) {
        Ok(recorder) => assert_refused(&recorder),
        Err(error) => {
            assert!(!rustix::process::geteuid().is_root(), "{error}");
            assert!(matches!(error, Errno::PERM | Errno::ACCESS), "{error}");
        }
    }
}

/// Checks that the daemon refuses a file of `recorder` in each place, without a call that waits.
fn assert_refused(recorder: &Recorder) {
    let mut options = File::options();
    let file = options
        .read(true)
        .write(true)
        .open(recorder.path().join("f"));
    let file = file.expect("file");
    let fds = [file.as_raw_fd()];

    let mut disk = Disk::serve();
    let held = recorder.hold_attributes();
    let region = longs(&[0, 1 << 32, SIZE, 0x7100_0000_0000, 0]);
    let table = [&longs(&[1])[..], &region[8..]].concat();
    let inflight = [&longs(&[4096, 0])[..], &[1, 0, 128, 0, 0, 0, 0, 0]].concat();
    for (request, body) in [
        (FrontendReq::ADD_MEM_REG, &region),
        (FrontendReq::SET_MEM_TABLE, &table),
        (FrontendReq::SET_LOG_BASE, &longs(&[4096, 0])),
        (FrontendReq::SET_INFLIGHT_FD, &inflight),
        // No descriptor belongs to it.
        (FrontendReq::SET_FEATURES, &longs(&[0])),
    ] {
        let mut raw = Raw::new(disk.daemon.connect());
        assert!(raw.send(request, NEED_REPLY, body, &fds));
        assert_ne!(raw.receive().expect("answer").number(), 0, "{request:?}");
        // This connection goes on, too.
        raw.ask(FrontendReq::GET_FEATURES, 0, &[])
            .expect("features");
        disk.assert_well();
    }
    assert!(disk.daemon.log().contains("FUSE, network"));

    drop(held);
    let status = disk.daemon.terminate();
    assert_eq!(status.code(), Some(0), "{}", disk.daemon.log());
}
