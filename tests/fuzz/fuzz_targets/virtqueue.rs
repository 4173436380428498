//! Guest memory and in-flight area of any content: every chain the rings name is walked and parsed,
//! in bounded time, nothing but what may be written is written, and what is left open comes back.
//!
//! An input is the queue's size and base, flags, and the memory: available ring, descriptor table,
//! then the rest, where the used ring lies too. With flag 4 its end is the in-flight area.
#![no_main]

use std::fs::File;
use std::os::unix::fs::FileExt;

use libfuzzer_sys::fuzz_target;
use ovbd_vhost::units::{Sector, SectorRange};
use ovbd_vhost::virtio::chain::{Chain, MAX_PIECES};
use ovbd_vhost::virtio::config::DeviceConfig;
use ovbd_vhost::virtio::dirty_log::DirtyLog;
use ovbd_vhost::virtio::discard::{DiscardRange, MAX_RANGES};
use ovbd_vhost::virtio::inflight::{InflightArea, Queues};
use ovbd_vhost::virtio::memory::{Memory, RegionInfo};
use ovbd_vhost::virtio::queue::{Queue, RingAddresses};
use ovbd_vhost::virtio::request::{HEADER, MAX_DATA, Operation};
use ovbd_vhost::virtio::status::Status;
use vm_memory::GuestAddress;

const LEN: u64 = 16384;
const BASE: u64 = 0x10000;
const TABLE: u64 = 0x200;
const USED: u64 = 0xC00;
const CAPACITY: u64 = 1 << 20;

fn memfd(len: u64, bytes: &[u8]) -> File {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let file = File::from(rustix::fs::memfd_create("guest", flags).expect("memfd"));
    file.set_len(len).expect("memory");
    let most = bytes.len().min(len as usize);
    file.write_all_at(&bytes[..most], 0).expect("memory");
    file
}

/// The guest's memory in two regions that touch, so that buffers can cross.
fn memory(file: &File) -> Memory {
    let mut memory = Memory::default();
    for (at, len) in [(0, 0x2000), (0x2000, LEN - 0x2000)] {
        let info = RegionInfo {
            guest: BASE + at,
            len,
            user: BASE + at,
            file_offset: at,
        };
        let file = file.try_clone().expect("descriptor");
        memory = memory.with_region(info, file).expect("region");
    }
    memory
}

fuzz_target!(|bytes: &[u8]| {
    let [size, low, high, flags, bytes @ ..] = bytes else {
        return;
    };
    let size: u16 = 1 << (size % 8);
    let base = u16::from_le_bytes([*low, *high]);
    let flag = |bit: u8| flags & 1 << bit != 0;
    let (event_idx, indirect, tracked, logged) = (flag(0), flag(1), flag(2), flag(3));
    let writable = flag(4);

    let queues = Queues { count: 1, size };
    let (file, area_len) = InflightArea::create(queues, queues).expect("in-flight area");
    let mut bytes = bytes;
    if tracked {
        let (rest, area) = bytes.split_at(bytes.len().saturating_sub(area_len as usize));
        file.write_all_at(area, 0).expect("in-flight area");
        bytes = rest;
    }
    let area = InflightArea::map(&file, 0, area_len, queues, queues).expect("in-flight area");
    let log = memfd(16, &[]);
    let log = DirtyLog::map(&log, 0, 16).expect("log");
    let guest = memfd(LEN, bytes);
    let memory = memory(&guest).with_log(logged.then(|| log.into()));
    let rings = RingAddresses {
        available: GuestAddress(BASE),
        descriptors: GuestAddress(BASE + TABLE),
        used: GuestAddress(BASE + USED),
        used_log: logged.then_some(GuestAddress(BASE + USED)),
    };

    let used_index = || {
        let mut bytes = [0; 2];
        guest.read_exact_at(&mut bytes, USED + 2).expect("memory");
        u16::from_le_bytes(bytes)
    };
    let mut expected = used_index();
    let inflight = || tracked.then(|| area.queue(0, size).expect("area of the queue"));
    let Ok(mut queue) = Queue::start(&memory, size, rings, Some(base), event_idx, inflight())
    else {
        return;
    };
    let mut chain = Chain::default();
    let mut open = 0usize;
    for turn in 0..2 * u32::from(size) {
        let Ok(Some(head)) = queue.pop() else { break };
        assert!(head.number() < size);
        let walked = chain.walk(&memory, queue.descriptors(), head.number(), indirect);
        let answered = walked
            .as_ref()
            .map_or_else(|bad| bad.status, |status| Some(*status));
        let Some(status) = answered else {
            // The queue stops here.
            queue.put_back(head);
            open += usize::from(tracked);
            break;
        };
        if walked.is_ok() {
            assert!(
                chain.readable().pieces().len() + chain.writable().pieces().len() <= MAX_PIECES
            );
            let config = DeviceConfig {
                queues: 1,
                queue_size: 128,
                optimal_io: 4096,
                writable,
            };
            let inside = |range: SectorRange, len: usize| {
                assert_eq!(range.len().bytes(), len as u64);
                assert!(len <= MAX_DATA && range.end().0 <= CAPACITY);
            };
            match Operation::parse(&chain, &config, Sector(CAPACITY)) {
                Ok(Operation::Read(range)) => {
                    inside(range, chain.writable().len());
                    chain.writable().cursor(0).zero(chain.writable().len());
                }
                Ok(Operation::Write(range)) => {
                    assert!(writable);
                    let mut data = vec![0; chain.readable().len() - HEADER];
                    inside(range, data.len());
                    chain.readable().cursor(HEADER).read(&mut data);
                }
                Ok(Operation::Discard(ranges) | Operation::WriteZeroes(ranges)) => {
                    assert!(writable && ranges.len() <= MAX_RANGES as usize);
                    for DiscardRange { range, .. } in ranges {
                        assert!(range.end().0 <= CAPACITY);
                    }
                }
                _ => {}
            }
            if let Some(log) = memory.log() {
                chain.mark_written(log, chain.writable().len() as u64);
            }
        }
        let head = match turn % 3 {
            1 => queue.leave(head),
            _ => Err(head),
        };
        let Err(head) = head else {
            assert!(tracked);
            open += 1;
            continue;
        };
        status.write(Status::Ok, memory.log());
        queue.finish(head, 1);
        let _ = queue.publish();
        expected = expected.wrapping_add(1);
    }
    let _ = queue.enable_kicks();
    queue.disable_kicks();
    drop(queue);
    // What was taken and not answered is what the next process gets, unless the guest had us write
    // over its used ring, which the next one goes by.
    if used_index() == expected
        && let Ok(mut next) = Queue::start(&memory, size, rings, None, event_idx, inflight())
    {
        let mut found = 0;
        while let Some(head) = next.pop_open() {
            assert!(head.number() < size);
            let _ = next.leave(head);
            found += 1;
        }
        assert!(found >= open, "{found} of {open} open requests came back");
    }
});
