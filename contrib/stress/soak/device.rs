//! One device: a daemon, a front-end whose queues are kept full, and the trouble made for both.

use std::cell::RefCell;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use vhost::vhost_user::VhostUserFrontend;

use super::counts::Counts;
use super::health::Health;
use super::images::Image;
use crate::common::PATIENCE;
use crate::common::blk::{IOERR, OK, SECTOR};
use crate::common::content::Random;
use crate::common::daemon::Daemon;
use crate::common::guest::{Guest, Options};
use crate::common::load::{Load, Shape};
use crate::common::memory::{Memory, Region};
use crate::common::returning::Returning;
use crate::common::ring::{Addresses, Ring};
use crate::common::session::{Session, feature};

const QUEUE_SIZE: u16 = 128;

/// One shape of reads for each queue.
const SHAPES: [Shape; 2] = [
    Shape {
        depth: 32,
        len: 4096,
        segments: 1,
        indirect: false,
    },
    Shape {
        depth: 16,
        len: 49152,
        segments: 5,
        indirect: true,
    },
];

/// Guest address of the first region that comes and goes.
const EXTRA: u64 = 0x10_0000_0000;
const EXTRA_LEN: u64 = 1 << 20;

/// What a device is made of, and how rough it is treated.
pub struct Plan {
    /// What it is called in the summary.
    pub name: &'static str,
    /// More options for its daemon.
    pub options: &'static [&'static str],
    /// Whether its daemon is killed and restarted. One that is not shows leaks.
    pub restarts: bool,
}

/// A layer is cut while this is odd: reads that began or ended then may fail.
#[derive(Default)]
struct Faults(AtomicU64);

impl Faults {
    fn now(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }

    fn turn(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    fn excuse(&self, began: u64) -> bool {
        began % 2 == 1 || began != self.now()
    }
}

/// Reads at random until told to stop, and judges what comes back.
fn read(
    name: &str,
    load: &mut Load,
    image: &Image,
    faults: &Faults,
    counts: &Counts,
    random: &mut Random,
) {
    let len = load.shape().len as usize;
    let last = (image.content.len() - len) as u64 / SECTOR;
    // For each sector being read: how often, and when the first of these reads began.
    let began: RefCell<HashMap<u64, (u32, u64)>> = RefCell::default();
    let mut left = 500;
    let mut buffer = vec![0; len];
    load.run(
        || {
            left = u64::checked_sub(left, 1)?;
            let sector = random.within(0..=last);
            let mut began = began.borrow_mut();
            began.entry(sector).or_insert((0, faults.now())).0 += 1;
            Some(sector)
        },
        |done| {
            let mut began = began.borrow_mut();
            let Entry::Occupied(mut read) = began.entry(done.sector) else {
                return counts.unexpected.add();
            };
            read.get_mut().0 -= 1;
            let (others, began) = *read.get();
            if others == 0 {
                read.remove();
            }
            let start = (done.sector * SECTOR) as usize;
            done.data.copy_to(&mut buffer);
            if done.status == OK {
                let right = buffer == image.content[start..start + len];
                match right && done.len as usize == len + 1 {
                    true => counts.verified.add(),
                    false => counts.mismatches.add(),
                }
            } else if done.status == IOERR && faults.excuse(began) {
                counts.failed.add();
            } else {
                counts.unexpected.add();
                let now = faults.now();
                eprintln!(
                    "{name}: status {} at sector {}, faults {began} to {now}",
                    done.status, done.sector
                );
            }
        },
    );
}

/// Who makes the trouble.
struct Controller<'i> {
    image: &'i Image,
    plan: &'i Plan,
    daemon: Daemon,
    front_end: Returning,
    session: Option<Session>,
    extra: Option<std::sync::Arc<Region>>,
    extras: u64,
    random: Random,
    faults: &'i Faults,
    counts: &'i Counts,
}

impl Controller<'_> {
    fn connect(&mut self) {
        self.extra = None;
        self.session = Some(self.front_end.connect(self.daemon.connect()));
    }

    fn pause(&mut self, most: Duration) {
        let most = most.as_micros() as u64;
        thread::sleep(Duration::from_micros(self.random.below(most)));
    }

    /// One kind of trouble, after which everything works again.
    fn disturb(&mut self) {
        match self.random.below(8) {
            0 if self.plan.restarts => {
                self.daemon.kill();
                self.daemon.restart();
                self.counts.kills.add();
            }
            1 if self.plan.restarts => {
                assert_eq!(self.daemon.terminate().code(), Some(0));
                self.daemon.restart();
                self.counts.stops.add();
            }
            2 => self.cut_layer(),
            3 => self.cut_memory(),
            4..=5 => self.change_memory(),
            _ => {
                // Sometimes the old connection stands until the new one is there.
                let _old = self.session.take().filter(|_| self.random.coin());
                self.connect();
                self.counts.reconnects.add();
            }
        }
        if self
            .session
            .as_mut()
            .is_none_or(|session| session.capacity().is_err())
        {
            self.connect();
        }
    }

    fn cut_layer(&mut self) {
        self.faults.turn();
        let cut = self.image.cut(&mut self.random);
        self.pause(Duration::from_millis(50));
        drop(cut);
        self.faults.turn();
        self.counts.layer_cuts.add();
    }

    /// Another front-end takes over and cuts its memory: the device is free again for ours.
    fn cut_memory(&mut self) {
        self.session = None;
        let mut guest = Guest::boot(self.daemon.connect(), Options::default()).expect("guest");
        guest.assert_reads(0, &self.image.content);
        for region in &guest.memory.regions {
            region.file().set_len(0).expect("cut");
        }
        guest.queues[0].ring.vring.kick.write(1).expect("kick");
        let start = Instant::now();
        while guest.session.frontend.get_queue_num().is_ok() {
            assert!(start.elapsed() < PATIENCE, "a guest without memory goes on");
            thread::sleep(Duration::from_millis(1));
        }
        self.counts.memory_cuts.add();
    }

    /// A region comes or goes, by itself or with the whole table sent again.
    fn change_memory(&mut self) {
        let Some(session) = &mut self.session else {
            return;
        };
        if let Some(extra) = self.extra.take() {
            session
                .frontend
                .remove_mem_region(&extra.info())
                .expect("region removed");
        } else {
            // Not always at the same address.
            self.extras += 1;
            let base = EXTRA + self.extras % 5 * EXTRA_LEN;
            let extra = Region::new(base, EXTRA_LEN, 0);
            if self.random.coin() {
                let added = session.frontend.add_mem_region(&extra.info());
                added.expect("region added");
            } else {
                let mut memory = self.front_end.memory.clone();
                memory.regions.push(extra.clone());
                session.share(&memory).expect("memory table");
            }
            self.extra = Some(extra);
        }
        self.counts.memory_changes.add();
    }
}

/// Runs a device until `end`.
pub fn run(plan: &Plan, image: &Image, end: Instant, seed: u64, counts: &Counts) -> Health {
    let memory = Memory::typical();
    let event_idx = Returning::wanted().features & feature::EVENT_IDX != 0;
    let loads = SHAPES.into_iter().enumerate().map(|(index, shape)| {
        let at = Addresses::alloc(&memory, QUEUE_SIZE, [index; 3]);
        let ring = Ring::new(&memory, at, QUEUE_SIZE, event_idx);
        Load::new(ring, &memory, index, shape)
    });
    let loads: Vec<_> = loads.collect();
    let vrings = loads.iter().map(|load| load.ring.vring.clone()).collect();
    let faults = Faults::default();
    let mut controller = Controller {
        image,
        plan,
        daemon: Daemon::with(&image.files, plan.options),
        front_end: Returning::new(memory, vrings),
        session: None,
        extra: None,
        extras: 0,
        random: Random::new(seed),
        faults: &faults,
        counts,
    };
    controller.connect();
    let mut health = Health::new(plan.name);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for (number, mut load) in (1..).zip(loads) {
            let (stop, faults) = (&stop, &faults);
            scope.spawn(move || {
                let mut random = Random::new(seed + number);
                while !stop.load(Ordering::Relaxed) {
                    read(plan.name, &mut load, image, faults, counts, &mut random);
                }
            });
        }
        // Whatever happens here, the readers end.
        let _stop = Raise(&stop);
        while Instant::now() < end {
            controller.pause(Duration::from_millis(400));
            controller.disturb();
            health.sample(&controller.daemon);
        }
    });
    health
}

struct Raise<'f>(&'f AtomicBool);

impl Drop for Raise<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
