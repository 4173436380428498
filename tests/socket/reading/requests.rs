//! Block requests through the socket: every lawful shape, and the status of what must fail
//! (virtio 1.2, sections 2.7 and 5.2.6).

use common::blk::{self, DISCARD, FLUSH, GET_ID, IN, IOERR, OK, OUT, UNSUPP, WRITE_ZEROES};
use common::checks;
use common::content::difference;
use common::disk::Disk;
use common::guest::{Answer, Guest, Options, Placed};
use common::queue::{Layout, Segment, Waiting};
use common::session::{Wanted, feature};

struct Served {
    disk: Disk,
    guest: Guest,
}

fn served_with(options: Options, arguments: &[&str]) -> Served {
    let disk = Disk::serve_with(arguments);
    let guest = disk.guest(options);
    Served { disk, guest }
}

fn served() -> Served {
    served_with(Options::default(), &[])
}

impl Served {
    /// Runs a read that must succeed and checks its data, in all three layouts.
    fn assert_read(&mut self, placed: &Placed, sector: u64) {
        let len = placed.data.iter().map(|part| part.len).sum();
        for layout in [Layout::Direct, Layout::Indirect, Layout::Mixed(1)] {
            let answer = self.guest.run(0, placed, layout);
            assert_eq!((answer.status, answer.len), (OK, len + 1), "{layout:?}");
            let wrong = difference(&answer.data, self.disk.expected(sector, len));
            assert_eq!(wrong, None, "{layout:?}");
            for part in &placed.data {
                self.guest
                    .memory
                    .write(part.address, &vec![blk::FILL; part.len as usize]);
            }
            self.guest.memory.write(placed.status, &[blk::UNANSWERED]);
        }
    }

    /// Runs a request with this data buffer; it must be answered with `status` and nothing else.
    fn assert_refused(&mut self, kind: u32, sector: u64, len: u32, status: u8) {
        let placed = self.guest.place(kind, sector, len);
        let answer = self.guest.run(0, &placed, Layout::Direct);
        let what = format!("type {kind}, {len} bytes at sector {sector}");
        assert_eq!(answer.status, status, "{what}");
        assert_eq!(answer.len, 1, "{what}: only the status is written");
        assert!(
            answer.data.iter().all(|byte| *byte == blk::FILL),
            "{what}: data written"
        );
    }
}

#[test]
fn reads_of_every_layout_however_answers_are_waited_for() {
    for (seed, waiting) in [(1, Waiting::Called), (2, Waiting::Polling)] {
        for bits in [0, feature::EVENT_IDX] {
            let mut wanted = Wanted::all();
            wanted.features &= !bits;
            let options = Options {
                waiting,
                wanted,
                ..Options::default()
            };
            let mut served = served_with(options, &[]);
            checks::scattered_reads(&mut served.guest, 0, &served.disk.content, 250, seed + bits);
        }
    }
}

#[test]
fn header_in_sixteen_descriptors() {
    let mut served = served();
    let Placed {
        chain,
        data,
        status,
    } = served.guest.place(IN, 77, 8192);
    let header = chain[0].address;
    let bytes = (0..16).map(|byte| Segment::readable(header + byte, 1));
    let chain = bytes.chain(chain[1..].iter().copied()).collect();
    served.assert_read(
        &Placed {
            chain,
            data,
            status,
        },
        77,
    );
}

#[test]
fn data_in_as_many_descriptors_as_a_queue_holds() {
    let mut served = served();
    let placed = served.guest.place(IN, 500, 126 * 512);
    let start = placed.data[0].address;
    let data: Vec<_> = (0..126)
        .map(|part| Segment::writable(start + part * 512, 512))
        .collect();
    let (first, last) = (placed.chain[0], placed.chain[2]);
    let chain = [&[first], &data[..], &[last]].concat();
    served.assert_read(
        &Placed {
            chain,
            data,
            status: placed.status,
        },
        500,
    );
}

#[test]
fn data_cut_at_odd_bytes_in_any_order_of_addresses() {
    let mut served = served();
    let placed = served.guest.place(IN, 1000, 4096);
    let start = placed.data[0].address;
    let mut at = 0;
    let mut data = Vec::new();
    for len in [1, 511, 3, 1021, 7, 2000, 553] {
        data.push(Segment::writable(start + 8192 - at - u64::from(len), len));
        at += u64::from(len) + 5;
    }
    let chain = [&[placed.chain[0]], &data[..], &[placed.chain[2]]].concat();
    served.assert_read(
        &Placed {
            chain,
            data,
            status: placed.status,
        },
        1000,
    );
}

#[test]
fn one_buffer_across_two_regions_that_touch() {
    let mut served = served();
    let placed = served.guest.place(IN, 3, 4096);
    let border = served.guest.memory.regions[2].base();
    assert_eq!(served.guest.memory.regions[1].end(), border);
    for before in [1, 512, 2049, 4095] {
        let data = vec![Segment::writable(border - before, 4096)];
        let chain = vec![placed.chain[0], data[0], placed.chain[2]];
        served.assert_read(
            &Placed {
                chain,
                data,
                status: placed.status,
            },
            3,
        );
    }
    // The header and the status may lie across it too.
    served.guest.memory.write(border - 5, &blk::header(IN, 9));
    let data = vec![Segment::writable(border + 4096, 512)];
    let chain = vec![Segment::readable(border - 5, 16), data[0], placed.chain[2]];
    served.assert_read(
        &Placed {
            chain,
            data,
            status: placed.status,
        },
        9,
    );
}

#[test]
fn status_in_the_last_data_descriptor() {
    let mut served = served();
    let placed = served.guest.place(IN, 12, 1024);
    let data = placed.data[0];
    let shared = Segment {
        len: data.len + 1,
        ..data
    };
    let status = data.address + u64::from(data.len);
    served.guest.memory.write(status, &[blk::UNANSWERED]);
    let chain = vec![placed.chain[0], shared];
    served.assert_read(
        &Placed {
            chain,
            data: vec![data],
            status,
        },
        12,
    );
}

#[test]
fn first_and_last_sector_and_a_long_read() {
    let mut served = served();
    let last = served.disk.sectors() - 1;
    for (sector, len) in [(0, 512), (last, 512), (last - 7, 4096), (4097, 400 << 10)] {
        let placed = served.guest.place(IN, sector, len);
        served.assert_read(&placed, sector);
    }
}

#[test]
fn past_the_end_and_overflowing_sectors_are_io_errors() {
    let mut served = served();
    let sectors = served.disk.sectors();
    for (sector, len) in [
        (sectors, 512),
        (sectors - 1, 1024),
        (sectors - 7, 4096),
        (1 << 55, 512),
        // Times 512 these wrap around to a valid byte.
        ((1 << 55) + 1, 512),
        (1 << 63, 4096),
        (u64::MAX, 512),
        (u64::MAX - 7, 4096),
    ] {
        served.assert_refused(IN, sector, len, IOERR);
    }
    served.guest.assert_reads(0, &served.disk.content);
}

#[test]
fn a_length_that_is_no_multiple_of_512_is_an_io_error() {
    let mut served = served();
    for len in [1, 511, 513, 4095, 4097] {
        served.assert_refused(IN, 0, len, IOERR);
    }
}

#[test]
fn writes_to_a_read_only_disk_fail_and_change_nothing() {
    let mut served = served();
    assert!(served.guest.session.has(feature::RO));
    served.assert_refused(OUT, 0, 4096, IOERR);
    served.assert_refused(OUT, served.disk.sectors(), 512, IOERR);
    // Not offered for a disk that is read-only.
    for kind in [DISCARD, WRITE_ZEROES] {
        let placed = served.guest.place(kind, 0, 16);
        let range = [
            &0u64.to_le_bytes()[..],
            &8u32.to_le_bytes(),
            &0u32.to_le_bytes(),
        ]
        .concat();
        served.guest.memory.write(placed.data[0].address, &range);
        let answer = served.guest.run(0, &placed, Layout::Direct);
        assert_eq!(answer.status, UNSUPP, "type {kind}");
        assert_eq!(answer.len, 1);
    }
    served.guest.assert_reads(0, &served.disk.content);
}

#[test]
fn unknown_types_are_unsupported() {
    let mut served = served();
    for kind in [2, 3, 5, 9, 10, 14, 99, 1 << 31, u32::MAX - 1] {
        served.assert_refused(kind, 0, 512, UNSUPP);
    }
}

#[test]
fn flush_succeeds_though_it_is_not_offered() {
    let mut served = served();
    let answer = served.guest.request(0, FLUSH, 0, 0);
    assert_eq!(
        answer,
        Answer {
            status: OK,
            len: 1,
            data: vec![]
        }
    );
}

#[test]
fn the_serial_is_twenty_bytes_and_stable() {
    let id = |served: &mut Served| {
        let answer = served.guest.request(0, GET_ID, 0, 20);
        assert_eq!((answer.status, answer.len), (OK, 21));
        answer.data
    };
    let mut first = served();
    let serial = id(&mut first);
    assert!(
        serial.iter().any(|byte| byte.is_ascii_graphic()),
        "{serial:?}"
    );
    assert!(
        serial
            .iter()
            .all(|byte| *byte == 0 || byte.is_ascii_graphic()),
        "{serial:?}"
    );
    let mut second = served();
    assert_eq!(id(&mut second), serial, "the same image in another process");

    let mut named = served_with(Options::default(), &["--serial", "disk-one"]);
    assert_eq!(id(&mut named), b"disk-one\0\0\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn a_short_buffer_gets_the_beginning_of_the_serial() {
    let mut served = served_with(Options::default(), &["--serial", "0123456789abcdefghij"]);
    let placed = served.guest.place(GET_ID, 0, 7);
    let answer = served.guest.run(0, &placed, Layout::Direct);
    assert_eq!(
        answer,
        Answer {
            status: OK,
            len: 8,
            data: b"0123456".to_vec()
        }
    );
    let answer = served.guest.request(0, GET_ID, 0, 20);
    assert_eq!(answer.data, b"0123456789abcdefghij");
}

#[test]
fn requests_submitted_together_are_all_answered() {
    let mut served = served();
    for round in 0..20u64 {
        let mut placed = Vec::new();
        served.guest.scratch.clear();
        for index in 0..40u64 {
            let sector = (round * 40 + index) * 131 % (served.disk.sectors() - 8);
            let header = served.guest.scratch.put(0, &blk::header(IN, sector), 0);
            let data = Segment::writable(served.guest.scratch.take(1 + index % 2, 4096, 0), 4096);
            let status = served.guest.scratch.put(3, &[blk::UNANSWERED], 0);
            let chain = vec![
                Segment::readable(header, blk::HEADER),
                data,
                Segment::writable(status, 1),
            ];
            let layout = if index % 3 == 0 {
                Layout::Indirect
            } else {
                Layout::Direct
            };
            let head = served.guest.queues[0].submit(&chain, layout);
            placed.push((
                head,
                sector,
                Placed {
                    chain,
                    data: vec![data],
                    status,
                },
            ));
        }
        served.guest.queues[0].publish();
        for _ in 0..placed.len() {
            let used = served.guest.queues[0].wait();
            let mut all = placed.iter();
            let (_, sector, request) = all
                .find(|(head, ..)| u32::from(*head) == used.head)
                .expect("submitted head");
            let answer = served.guest.answer(request, used);
            assert_eq!((answer.status, answer.len), (OK, 4097), "sector {sector}");
            assert_eq!(
                difference(&answer.data, served.disk.expected(*sector, 4096)),
                None
            );
        }
    }
}
