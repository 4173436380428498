//! Guest memory of any content: every chain the rings name is walked and parsed, in bounded time,
//! and no byte outside the writable descriptors changes.
#![no_main]

use std::fs::File;

use libfuzzer_sys::fuzz_target;
use ovbd_vhost::units::Sector;
use ovbd_vhost::virtio::chain::{Chain, MAX_CHAIN};
use ovbd_vhost::virtio::memory::{Memory, RegionInfo};
use ovbd_vhost::virtio::queue::{Queue, RingAddresses};
use ovbd_vhost::virtio::request::{Operation, Request, Status};
use vm_memory::GuestAddress;

const LEN: u64 = 16384;
const BASE: u64 = 0x10000;

fuzz_target!(|input: (u8, u16, bool, bool, &[u8])| {
    let (size, base, event_idx, indirect, bytes) = input;
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let file = File::from(rustix::fs::memfd_create("guest", flags).expect("memfd"));
    file.set_len(LEN).expect("memory");
    let bytes = &bytes[..bytes.len().min(LEN as usize)];
    std::os::unix::fs::FileExt::write_all_at(&file, bytes, 0).expect("memory");
    let info = RegionInfo {
        guest: BASE,
        len: LEN,
        user: BASE,
        file_offset: 0,
    };
    let memory = Memory::default().with_region(info, file).expect("region");
    let rings = RingAddresses {
        descriptors: GuestAddress(BASE),
        available: GuestAddress(BASE + 4096),
        used: GuestAddress(BASE + 8192),
        used_log: None,
    };
    let size = 1 << (size % 8);
    let Ok(mut queue) = Queue::start(&memory, size, rings, Some(base), event_idx, None) else {
        return;
    };
    let mut chain = Chain::default();
    for _ in 0..size {
        let Ok(Some(head)) = queue.pop() else { break };
        assert!(head < size);
        let mut len = 0;
        if chain
            .walk(&memory, queue.descriptors(), head, indirect)
            .is_ok()
        {
            assert!(chain.readable.pieces().len() + chain.writable.pieces().len() <= MAX_CHAIN);
            let request = Request::parse(&mut chain, Sector(1 << 20));
            if let Ok(Operation::Read(start)) = request.operation {
                assert_eq!(chain.writable.len() % 512, 0);
                assert!(start.0 + chain.writable.len() as u64 / 512 <= 1 << 20);
                chain.writable.cursor(0).zero(chain.writable.len());
            }
            if let Some(status) = request.status {
                status.write(Status::Ok);
                len = 1;
            }
        }
        queue.finish(head, len);
        let _ = queue.publish();
    }
    let _ = queue.enable_kicks();
    queue.disable_kicks();
});
