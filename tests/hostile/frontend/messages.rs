//! Messages of the wrong form, or in the wrong order.

use super::*;

#[test]
fn half_a_header_and_half_a_message() {
    let mut disk = Disk::serve();
    let whole = message(2, VERSION, 8, &[0; 8]);
    for len in 1..whole.len() {
        let raw = connect(&disk);
        assert!(raw.send_bytes(&whole[..len], &[]));
        drop(raw);
    }
    disk.assert_well();
}

#[test]
fn headers_that_make_no_sense() {
    let mut disk = Disk::serve();
    for (request, flags, len) in [
        (0, VERSION, 0),
        (45, VERSION, 0),
        (1000, VERSION, 0),
        (u32::MAX, VERSION, 0),
        // No version, a later one, an answer, reserved flags.
        (1, 0, 0),
        (1, 2, 0),
        (1, VERSION | REPLY, 0),
        (1, VERSION | 0xffff_fff0, 0),
        // Payloads too long, and a wrong length for the message.
        (2, VERSION, u32::MAX),
        (2, VERSION, 0x1001),
        (2, VERSION, 0x1000_0000),
    ] {
        let mut raw = connect(&disk);
        let sent = raw.send_bytes(&message(request, flags, len, &[]), &[]);
        if sent {
            raw.assert_closed();
        }
        disk.assert_well();
    }
}

/// A message that stops a queue without a drain belongs to protocol feature 20, which is not offered.
#[test]
fn a_stop_without_a_drain_is_not_offered_and_is_refused() {
    const STOP: u32 = 45;
    let mut disk = Disk::serve();
    let mut raw = negotiated(&disk);
    let offered = raw.ask(FrontendReq::GET_PROTOCOL_FEATURES, 0, &[]);
    assert_eq!(offered.expect("features").number() >> 20 & 1, 0);
    let body = words(&[0, 0]);
    let flags = VERSION | NEED_REPLY;
    assert!(raw.send_bytes(&message(STOP, flags, body.len() as u32, &body), &[]));
    if let Some(answer) = raw.receive() {
        assert_ne!(answer.number(), 0, "refused");
    }
    disk.assert_well();
}

#[test]
fn payloads_of_the_wrong_length() {
    let mut disk = Disk::serve();
    for request in [
        FrontendReq::SET_FEATURES,
        FrontendReq::SET_PROTOCOL_FEATURES,
        FrontendReq::SET_MEM_TABLE,
        FrontendReq::SET_VRING_NUM,
        FrontendReq::SET_VRING_ADDR,
        FrontendReq::SET_VRING_KICK,
        FrontendReq::GET_CONFIG,
        FrontendReq::SET_INFLIGHT_FD,
        FrontendReq::ADD_MEM_REG,
    ] {
        for len in [1, 7, 13, 4096] {
            assert_refused(&mut disk, request, &vec![0; len], &[]);
        }
    }
}

#[test]
fn queues_that_are_none() {
    let mut disk = Disk::serve();
    for index in [0x100, 0xffff, u32::MAX] {
        for request in [
            FrontendReq::SET_VRING_NUM,
            FrontendReq::SET_VRING_BASE,
            FrontendReq::SET_VRING_ENABLE,
        ] {
            assert_refused(&mut disk, request, &words(&[index, 1]), &[]);
        }
    }
}

#[test]
fn queue_sizes_that_are_none() {
    let mut disk = Disk::serve();
    for size in [0, 3, 100, 0x8001, 0x1_0000, u32::MAX] {
        assert_refused(
            &mut disk,
            FrontendReq::SET_VRING_NUM,
            &words(&[0, size]),
            &[],
        );
    }
}

#[test]
fn file_descriptors_where_none_belong_and_none_where_some_do() {
    let mut disk = Disk::serve();
    let file = File::open("/dev/null").expect("/dev/null");
    let fd = file.as_raw_fd();
    let region = longs(&[0, 0x1000_0000, 0x1000, 0x7000_0000, 0]);
    let table = [&words(&[1, 0])[..], &region[8..]].concat();
    assert_refused(&mut disk, FrontendReq::SET_FEATURES, &longs(&[0]), &[fd]);
    assert_refused(&mut disk, FrontendReq::SET_MEM_TABLE, &table, &[]);
    assert_refused(&mut disk, FrontendReq::SET_MEM_TABLE, &table, &[fd, fd]);
    assert_refused(&mut disk, FrontendReq::ADD_MEM_REG, &region, &[]);
    assert_refused(&mut disk, FrontendReq::ADD_MEM_REG, &region, &[fd, fd]);
    assert_refused(&mut disk, FrontendReq::SET_VRING_KICK, &longs(&[0]), &[]);
    assert_refused(
        &mut disk,
        FrontendReq::SET_VRING_KICK,
        &longs(&[0]),
        &[fd, fd],
    );
    // Descriptors that are no memory.
    assert_refused(&mut disk, FrontendReq::SET_MEM_TABLE, &table, &[fd]);
    assert_refused(&mut disk, FrontendReq::ADD_MEM_REG, &region, &[fd]);
    let inflight = [&longs(&[0x1000, 0])[..], &[1, 0, 128, 0, 0, 0, 0, 0]].concat();
    assert_refused(&mut disk, FrontendReq::SET_INFLIGHT_FD, &inflight, &[fd]);
}

#[test]
fn memory_that_is_absurd() {
    let mut disk = Disk::serve();
    let region = Region::new(0x1000_0000, 1 << 20, 0);
    let fd = region.file().as_raw_fd();
    for (guest, size, user, offset) in [
        // Empty, beyond the end of the file, and overflowing.
        (0x1000_0000, 0, 0x7000_0000, 0),
        (0x1000_0000, 2 << 20, 0x7000_0000, 0),
        (0x1000_0000, 1 << 20, 0x7000_0000, 1 << 20),
        (0x1000_0000, 1 << 62, 0x7000_0000, 0),
        (u64::MAX - 0xfff, 1 << 20, 0x7000_0000, 0),
        (0x1000_0000, 1 << 20, u64::MAX - 0xfff, 0),
        (0x1000_0000, 1 << 20, 0x7000_0000, u64::MAX - 0xfff),
    ] {
        let entry = longs(&[guest, size, user, offset]);
        let table = [&words(&[1, 0])[..], &entry].concat();
        assert_refused(&mut disk, FrontendReq::SET_MEM_TABLE, &table, &[fd]);
        let single = [&longs(&[0])[..], &entry].concat();
        assert_refused(&mut disk, FrontendReq::ADD_MEM_REG, &single, &[fd]);
    }
    // Two regions that overlap.
    let entry = longs(&[0x1000_0000, 1 << 20, 0x7000_0000, 0]);
    let over = longs(&[0x1008_0000, 1 << 20, 0x8000_0000, 0]);
    let table = [&words(&[2, 0])[..], &entry, &over].concat();
    assert_refused(&mut disk, FrontendReq::SET_MEM_TABLE, &table, &[fd, fd]);
}

#[test]
fn a_config_space_that_is_asked_for_beyond_its_end() {
    let mut disk = Disk::serve();
    for (offset, len) in [
        // Behind the 256 bytes there are, and behind the same at the offset of virtio-mmio.
        (0xf0, 0x20),
        (0x1f0, 0x20),
        (0xff, 2),
        (0x300, 1),
        // What no message may ask for.
        (0xff0, 0x20),
        (u32::MAX, 1),
        (0, 0),
    ] {
        let body = [&words(&[offset, len, 0])[..], &vec![0; len as usize]].concat();
        // A front-end can go on without these bytes.
        let mut raw = connect(&disk);
        let answer = raw.ask(FrontendReq::GET_CONFIG, 0, &body).expect("answer");
        assert_eq!(answer.body, words(&[offset, 0, 0]));
        let body = words(&[0, 8, 0, 0, 0]);
        let answer = raw.ask(FrontendReq::GET_CONFIG, 0, &body).expect("answer");
        assert_eq!(answer.body.len(), body.len());
        drop(raw);
        disk.assert_well();
    }
}

/// An answer of no bytes and no descriptor: a front-end can go on without an in-flight area.
#[test]
fn in_flight_areas_that_the_device_cannot_have() {
    let mut disk = Disk::serve();
    let mut raw = connect(&disk);
    let mut ask = |queues: u16, size: u16| {
        let sizes = [queues, size, 0, 0].map(u16::to_le_bytes);
        let body = [&longs(&[0, 0])[..], sizes.as_flattened()].concat();
        let answer = raw.ask(FrontendReq::GET_INFLIGHT_FD, 0, &body);
        answer.expect("answer")
    };
    for (queues, size) in [(0, 128), (1, 0), (0, 0), (257, 128), (1, 2048)] {
        let answer = ask(queues, size);
        assert_eq!(answer.body[..8], [0; 8], "{queues} queues of {size}");
        assert!(answer.file.is_none(), "{queues} queues of {size}");
    }
    let answer = ask(1, 128);
    assert!(answer.file.is_some() && answer.body[..8] != [0; 8]);
    disk.assert_well();
}

/// A front-end that reconnects may have negotiated replies before.
#[test]
fn a_message_that_asks_for_a_reply_gets_one_whatever_was_negotiated() {
    let mut disk = Disk::serve();
    let plain = feature::VERSION_1;
    for (features, protocol) in [(plain, None), (plain | feature::PROTOCOL, Some(0))] {
        let mut raw = connect(&disk);
        let send = |request, bits: u64| assert!(raw.send(request, 0, &longs(&[bits]), &[]));
        if let Some(bits) = protocol {
            send(FrontendReq::SET_PROTOCOL_FEATURES, bits);
        }
        send(FrontendReq::SET_FEATURES, features);
        for (size, fails) in [(128, false), (3, true)] {
            let answer = raw.ask(FrontendReq::SET_VRING_NUM, NEED_REPLY, &words(&[0, size]));
            assert_eq!(
                answer.expect("answer").number() != 0,
                fails,
                "{features:#x}"
            );
        }
    }
    disk.assert_well();
}

/// Such a queue says so on its error descriptor, and runs once there is memory.
#[test]
fn queues_started_before_there_is_memory() {
    let disk = Disk::serve();
    let mut session = Session::negotiate(disk.daemon.connect(), Wanted::all()).expect("session");
    let memory = Memory::typical();
    let queue = Queue::new(&memory, 128, session.has(feature::EVENT_IDX));
    let vring = queue.ring.vring.clone();
    session.start_queue(0, &vring, 0).expect("set up");
    vring.kick.write(1).expect("kick");
    assert!(signalled(&[&vring.err]), "the queue cannot run");
    assert_eq!(vring.err.read().expect("error"), 1, "said once");
    session.share(&memory).expect("memory");
    let mut guest = Guest {
        queues: vec![queue],
        scratch: Scratch::new(&memory, 512 << 10),
        session,
        memory,
    };
    guest.assert_reads(0, &disk.content);
}

#[test]
fn a_polling_front_end_gives_no_call_descriptor() {
    // Bit 8 of the payload: no descriptor, the driver polls.
    let mut disk = Disk::serve();
    let mut raw = negotiated(&disk);
    for request in [FrontendReq::SET_VRING_CALL, FrontendReq::SET_VRING_ERR] {
        let answer = raw
            .ask(request, NEED_REPLY, &longs(&[0x100]))
            .expect("answer");
        assert_eq!(
            answer.number(),
            0,
            "{request:?} without a descriptor is lawful"
        );
    }
    drop(raw);
    disk.assert_well();
}

#[test]
fn noise() {
    let mut disk = Disk::serve();
    let mut random = common::content::Random::new(77);
    for _ in 0..300 {
        let raw = connect(&disk);
        let bytes: Vec<u8> = (0..random.within(1..=200))
            .map(|_| random.any() as u8)
            .collect();
        raw.send_bytes(&bytes, &[]);
        // The same with a header that is almost right.
        let raw = connect(&disk);
        let len = random.below(64) as u32;
        let body: Vec<u8> = (0..len).map(|_| random.any() as u8).collect();
        let request = random.within(1..=44) as u32;
        raw.send_bytes(&message(request, VERSION | NEED_REPLY, len, &body), &[]);
    }
    disk.assert_well();
}
