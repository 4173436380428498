//! The guest's side: keeps queues full and measures what comes back.

use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use crate::Result;
use vm_memory::VolatileSlice;

use crate::content::{BLOCK, Content, WINDOW};
use crate::histogram::Histogram;
use common::PATIENCE;
use common::blk;
use common::content::Random;
use common::load::{Load, Shape};
use common::memory::{Memory, Region};
use common::ring::{Addresses, Ring};
use common::session::{Session, Wanted, feature};

const SECTORS_PER_BLOCK: u64 = BLOCK as u64 / blk::SECTOR;

/// Most requests in flight.
const MAX_DEPTH: u16 = 32;

/// What one queue is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Name for reports.
    pub name: &'static str,
    /// Whether reads are spread at random, or follow each other.
    pub random: bool,
    /// Bytes of a read.
    pub len: usize,
    /// Requests in flight in each queue.
    pub depth: u16,
}

/// The workloads, in the order they are run in.
pub const WORKLOADS: [Workload; 3] = [
    Workload {
        name: "rand32",
        random: true,
        len: BLOCK,
        depth: MAX_DEPTH,
    },
    Workload {
        name: "rand1",
        random: true,
        len: BLOCK,
        depth: 1,
    },
    Workload {
        name: "seq8",
        random: false,
        len: WINDOW,
        depth: 8,
    },
];

/// When to stop.
#[derive(Clone, Copy)]
pub struct Limit {
    /// After this long.
    pub time: Duration,
    /// After this many reads in each queue.
    pub count: u64,
}

/// What came of keeping a device busy.
#[derive(Clone, Default)]
pub struct Outcome {
    /// Reads answered.
    pub reads: u64,
    /// Seconds it took.
    pub seconds: f64,
    /// How long reads took.
    pub times: Histogram,
}

/// A device with its queues running.
pub struct Connection {
    loads: Vec<Load>,
    workload: Workload,
    orders: Vec<Order>,
    /// Keeps the queues running.
    _session: Session,
    /// Whether it holds what the raw image holds, or nothing.
    filled: bool,
}

/// What to read next.
enum Order {
    Random(Random),
    /// One after the other; the number of the last one.
    Ascending(usize),
}

impl Order {
    /// One of `blocks`.
    fn next(&mut self, blocks: &[u32]) -> u32 {
        match self {
            Self::Random(random) => blocks[random.below(blocks.len() as u64) as usize],
            Self::Ascending(last) => {
                *last += 1;
                blocks[*last % blocks.len()]
            }
        }
    }
}

impl Connection {
    /// Connects, shares memory, and starts `queues` queues, each with room for `workload`. A device
    /// that is not `filled` may bring anything.
    pub fn open(
        stream: UnixStream,
        queues: usize,
        workload: Workload,
        filled: bool,
    ) -> Result<Self> {
        let mut session = Session::negotiate(stream, Wanted::all())?;
        let memory = Memory {
            regions: vec![Region::new(0x1_0000_0000, 16 << 20, 0)],
        };
        session.share(&memory)?;
        let size = (3 * workload.depth).next_power_of_two();
        let mut loads = Vec::new();
        for index in 0..queues {
            let at = Addresses::alloc(&memory, size, [0, 0, 0]);
            let ring = Ring::new(&memory, at, size, session.has(feature::EVENT_IDX));
            session.start_queue(index, &ring.vring, 0)?;
            let shape = Shape {
                depth: workload.depth,
                len: workload.len as u32,
                segments: 1,
                indirect: false,
            };
            loads.push(Load::new(ring, &memory, 0, shape));
        }
        // Queues begin far apart.
        let order = |queue: usize| match workload.random {
            true => Order::Random(Random::new(queue as u64)),
            false => Order::Ascending(queue * 1_000_003),
        };
        Ok(Self {
            loads,
            workload,
            orders: (0..queues).map(order).collect(),
            _session: session,
            filled,
        })
    }

    /// Keeps all queues full until the limit, one thread for each, and checks a word of each block.
    ///
    /// With `spin`, a thread that has nothing to do keeps its processor.
    pub fn measure(&mut self, content: &Content, limit: Limit, spin: bool) -> Result<Outcome> {
        let blocks = match self.workload.random {
            true => content.blocks(),
            false => content.windows(),
        };
        let filled = self.filled;
        let start = Instant::now();
        let parts: Vec<_> = thread::scope(|scope| {
            let queues = self.loads.iter_mut().zip(&mut self.orders);
            let threads: Vec<_> = queues
                .map(|(load, order)| {
                    let next = move |_: u64| order.next(blocks);
                    let check = |first, data: &VolatileSlice<'_>| {
                        Ok(content.wrong(first, data).filter(|_| filled))
                    };
                    let depth = self.workload.depth;
                    scope.spawn(move || drive(load, depth, limit, spin, next, check))
                })
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().expect("front-end"))
                .collect()
        });
        let mut outcome = Outcome::default();
        for part in parts {
            let (reads, times) = part?;
            outcome.reads += reads;
            outcome.times.add(&times);
        }
        outcome.seconds = start.elapsed().as_secs_f64();
        Ok(outcome)
    }

    /// Reads the whole disk in windows through the first queue, and compares all of it.
    pub fn compare(&mut self, content: &Content) -> Result<()> {
        let windows = u64::from(content.len()) / (WINDOW / BLOCK) as u64;
        let next = |number: u64| (number * (WINDOW / BLOCK) as u64) as u32;
        let check = |first, data: &VolatileSlice<'_>| Ok(content.wrong_anywhere(first, data)?);
        let limit = Limit {
            time: Duration::MAX,
            count: windows,
        };
        let (reads, _) = drive(
            &mut self.loads[0],
            self.workload.depth,
            limit,
            false,
            next,
            check,
        )?;
        assert_eq!(reads, windows);
        Ok(())
    }
}

/// Keeps one queue full with the blocks `next` yields by number of request.
fn drive(
    load: &mut Load,
    depth: u16,
    limit: Limit,
    spin: bool,
    mut next: impl FnMut(u64) -> u32,
    mut check: impl FnMut(u32, &VolatileSlice) -> Result<Option<u32>>,
) -> Result<(u64, Histogram)> {
    let start = Instant::now();
    let mut now = start;
    let mut issued = [start; MAX_DEPTH as usize];
    let (mut asked, mut answered) = (0, 0);
    let mut times = Histogram::default();
    for slot in 0..depth.min(limit.count.try_into().unwrap_or(depth)) {
        load.submit(slot, u64::from(next(asked)) * SECTORS_PER_BLOCK);
        asked += 1;
    }
    load.ring.want_no_call();
    load.ring.publish();
    while load.in_flight() > 0 {
        let mut any = false;
        while let Some(done) = load.take() {
            if !any {
                now = Instant::now();
                any = true;
            }
            let (slot, first) = (done.slot, (done.sector / SECTORS_PER_BLOCK) as u32);
            if done.status != blk::OK {
                return Err(format!("block {first}: status {}", done.status).into());
            }
            if let Some(block) = check(first, &done.data)? {
                return Err(format!("block {block} is not what the raw image holds").into());
            }
            let waited = now - issued[usize::from(slot)];
            times.record(waited.as_nanos() as u64);
            answered += 1;
            if asked < limit.count && now - start < limit.time {
                load.submit(slot, u64::from(next(asked)) * SECTORS_PER_BLOCK);
                issued[usize::from(slot)] = now;
                asked += 1;
            }
        }
        if any {
            load.ring.want_no_call();
            load.ring.publish();
        } else if !spin {
            thread::yield_now();
        } else {
            std::hint::spin_loop();
        }
        if !any && now.elapsed() > PATIENCE {
            return Err(format!("no answer to {} requests", load.in_flight()).into());
        }
    }
    Ok((answered, times))
}
