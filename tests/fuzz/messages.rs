//! Seeds of the target `messages`: sessions of a polite front-end.

use super::steps::{AREA, LOG, MEMORY, NO_FD, OTHER, SOCKET, Steps, USER, WRITABLE, changes};
use super::{folder, write};

#[test]
fn messages() {
    let new = || Steps::default().memory().negotiate();
    // The in-flight area of four queues of eight takes 4 * 192 bytes.
    let tracked = |steps: Steps| steps.message(32, AREA, &[768, 0, 4 | 8 << 16]);
    let seeds = [
        new().table().queue(0, 0).kick().message(11, NO_FD, &[0]),
        // GPU_SET_SOCKET, which no disk takes.
        new().message(33, SOCKET, &[]),
        tracked(new().message(31, NO_FD, &[0, 0, 4 | 8 << 16]))
            .table()
            .queue(0, 0)
            .kick()
            .message(18, NO_FD, &[0])
            .message(34, NO_FD, &[]),
        new()
            .table()
            .message(6, LOG, &[0x1000, 0])
            .queue(0, 1)
            .message(2, NO_FD, &[1 << 32 | 1 << 30 | 1 << 26])
            .kick()
            .message(6, LOG, &[0x800, 0x1000])
            .kick()
            .message(11, NO_FD, &[0]),
        new()
            .message(36, NO_FD, &[])
            .message(37, MEMORY, &[0, 0x10000, 0x8000, USER, 0])
            .message(37, MEMORY, &[0, 0x18000, 0x8000, USER + 0x8000, 0x8000])
            .queue(1, 0)
            .kick()
            .message(38, NO_FD, &[0, 0x18000, 0x8000, USER + 0x8000, 0])
            .kick()
            .message(11, NO_FD, &[1]),
        new().table().queue(0, 0).kick().cut(0, 1).kick(),
        tracked(new()).table().queue(0, 0).cut(1, 0).kick(),
        new()
            .table()
            .message(6, LOG, &[0x1000, 0])
            .message(2, NO_FD, &[1 << 32 | 1 << 30 | 1 << 26])
            .queue(0, 1)
            .cut(2, 0)
            .kick(),
        new()
            .message(17, NO_FD, &[])
            .message(24, NO_FD, &[60 << 32, 1, 0, 0, 0, 0, 0, 0])
            .message(25, NO_FD, &[32 | 1 << 32, 1])
            .message(42, OTHER, &[1])
            .message(43, NO_FD, &[]),
    ];
    let chains = changes();
    let all = chains.heads.len();
    let available = |steps: Steps, count: usize| steps.bytes(2, &(count as u16).to_le_bytes());
    // All in turn, then writes that are durable once answered, then another queue goes on there.
    let session = |way| {
        let steps = chains.lay(Steps::default(), 4).writable(way);
        let steps = steps.negotiate_for(WRITABLE).table();
        let steps = available(steps.queue_of(32, 0, 0, 0).kick(), all).kick();
        let steps = steps.set_writeback(0);
        let steps = available(steps, all + 2).kick().message(11, NO_FD, &[0]);
        let steps = steps.queue_of(32, 1, 0, all as u64 + 2);
        available(steps, all + 5).kick().message(11, NO_FD, &[1])
    };
    // An area of four queues of 32 takes 4 * 576 bytes; a driver that cannot flush; a log.
    let steps = chains.lay(Steps::default(), all).writable(0);
    let through = steps
        .negotiate_for(1 << 26 | 1 << 13 | 1 << 14)
        .message(32, AREA, &[2304, 0, 4 | 32 << 16])
        .message(6, LOG, &[0x1000, 0])
        .table()
        .queue_of(32, 0, 1, 0)
        .kick()
        .kick();
    let again = new().writable(1).table().queue(0, 0).kick();
    // Two writes, of which only the journal knows.
    let steps = chains.lay(Steps::default(), 2).writable(0);
    let unflushed = steps.negotiate_for(WRITABLE).table();
    let unflushed = unflushed.queue_of(32, 0, 0, 0).kick();
    let writing = (0..4).map(session).chain([through, again, unflushed]);
    let seeds = seeds.into_iter().chain(writing);
    let written = write(&folder("messages"), seeds.map(|steps| steps.0));
    assert_eq!(written, 16);
}
