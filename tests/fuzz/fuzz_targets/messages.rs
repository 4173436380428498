//! Any bytes and descriptors on the socket: the session ends, and its queues with it.
#![no_main]

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use ovbd_vhost::engine::{Disk, Tuning};
use ovbd_vhost::format::lsmt::{HEADER_LEN, Header, Part};
use ovbd_vhost::image::Image;
use ovbd_vhost::image::spec::Stack;
use ovbd_vhost::vhost::session;
use ovbd_vhost::virtio::config::DeviceConfig;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

#[path = "../file.rs"]
mod file;

/// An empty disk of 1 MiB.
static DISK: LazyLock<Arc<Disk>> = LazyLock::new(|| {
    let mut header = Header {
        index_offset: 0,
        index_entries: 0,
        virtual_size: 1 << 20,
        uuid: Default::default(),
        parent_uuid: Default::default(),
        message: Vec::new(),
    };
    let mut bytes = header.encode(Part::Header).to_vec();
    header.index_offset = HEADER_LEN as u64;
    bytes.extend(header.encode(Part::Trailer));
    let held = file::Held::new(&bytes);
    let image = Image::open(&Stack::new([held.path()])).expect("an empty layer");
    let config = DeviceConfig {
        capacity: image.sectors(),
        queues: 4,
        queue_size: 64,
        optimal_io: 4096,
    };
    let tuning = Tuning {
        poll: Duration::ZERO,
        io_uring: false,
        readahead: 0,
        drop_cache: false,
        cpus: Vec::new(),
    };
    Arc::new(Disk {
        image,
        config,
        serial: [0; 20],
        cache: None,
        tuning,
    })
});

fn descriptor(kind: u8) -> OwnedFd {
    match kind % 3 {
        0 => rustix::fs::memfd_create("m", rustix::fs::MemfdFlags::CLOEXEC)
            .and_then(|fd| rustix::fs::ftruncate(&fd, 1 << 20).map(|()| fd))
            .expect("memfd"),
        1 => rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).expect("eventfd"),
        _ => UnixStream::pair().expect("pair").0.into(),
    }
}

fuzz_target!(|messages: Vec<(Vec<u8>, Vec<u8>)>| {
    let (ours, theirs) = UnixStream::pair().expect("pair");
    let disk = DISK.clone();
    let serving = std::thread::spawn(move || session::serve(theirs, disk));
    ours.set_write_timeout(Some(Duration::from_secs(1)))
        .expect("socket");
    for (bytes, kinds) in messages.iter().take(16) {
        let fds: Vec<OwnedFd> = kinds.iter().take(8).map(|kind| descriptor(*kind)).collect();
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !borrowed.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&borrowed));
        }
        if sendmsg(
            &ours,
            &[IoSlice::new(bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        )
        .is_err()
        {
            break;
        }
    }
    let _ = ours.shutdown(Shutdown::Both);
    let _ = serving.join().expect("the session panicked");
});
