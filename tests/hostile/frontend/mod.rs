//! A front-end that breaks the vhost-user protocol loses its connection, no more: the next one is
//! served.

mod cut_short;
mod many;
mod messages;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::thread;
use std::time::{Duration, Instant};

use common::PATIENCE;
use common::blk::{DISCARD, IN, OK, Scratch, WRITE_ZEROES, range};
use common::disk::Disk;
use common::guest::{Guest, Options};
use common::memory::{Memory, Region};
use common::queue::{Layout, Queue, signalled};
use common::raw::{NEED_REPLY, REPLY, Raw, VERSION, message};
use common::session::{Session, Wanted, feature};
use tempfile::TempDir;
use vhost::vhost_user::message::{FrontendReq, VhostUserInflight};
use vhost::vhost_user::{VhostUserFrontend, VhostUserProtocolFeatures as Protocol};
use vhost::{VhostBackend, VhostUserDirtyLogRegion};

fn connect(disk: &Disk) -> Raw {
    Raw::new(disk.daemon.connect())
}

/// A connection that negotiated what most messages need, REPLY_ACK among it.
fn negotiated(disk: &Disk) -> Raw {
    let mut raw = connect(disk);
    let features = feature::VERSION_1 | feature::PROTOCOL;
    let protocol = Protocol::REPLY_ACK
        | Protocol::CONFIG
        | Protocol::MQ
        | Protocol::INFLIGHT_SHMFD
        | Protocol::CONFIGURE_MEM_SLOTS
        | Protocol::LOG_SHMFD;
    raw.ask(FrontendReq::GET_FEATURES, 0, &[])
        .expect("features");
    raw.ask(FrontendReq::GET_PROTOCOL_FEATURES, 0, &[])
        .expect("protocol features");
    let protocol = protocol.bits().to_le_bytes();
    assert!(raw.send(FrontendReq::SET_PROTOCOL_FEATURES, 0, &protocol, &[]));
    raw.ask(
        FrontendReq::SET_FEATURES,
        NEED_REPLY,
        &features.to_le_bytes(),
    )
    .expect("ack");
    raw
}

/// The message must be refused: by an answer that says so, or by hanging up. The configuration space
/// is refused by an answer of no bytes of it, everything else by an acknowledgement that is not 0.
fn assert_refused(disk: &mut Disk, request: FrontendReq, body: &[u8], fds: &[i32]) {
    let mut raw = negotiated(disk);
    let sent = raw.send(request, NEED_REPLY, body, fds);
    if sent && let Some(answer) = raw.receive() {
        let refused = match request {
            FrontendReq::GET_CONFIG => answer.body.get(4..8) == Some(&[0; 4]),
            _ => answer.number() != 0,
        };
        assert!(refused, "{request:?} with {body:02x?}: {answer:02x?}");
    }
    drop(raw);
    disk.assert_well();
}

/// A payload of 32-bit numbers.
fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A payload of 64-bit numbers.
fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_le_bytes()).collect()
}
