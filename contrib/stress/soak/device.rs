//! One device: a daemon, a front-end whose queues are kept full, and the trouble made for both.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use vhost::vhost_user::VhostUserFrontend;

use super::changes;
use super::counts::Counts;
use super::health::Health;
use super::images::Image;
use super::reads::{Faults, Reads, SHAPES};
use common::PATIENCE;
use common::content::Random;
use common::daemon::Daemon;
use common::guest::{Guest, Options};
use common::load::Load;
use common::memory::{Memory, Region};
use common::mixed::Mixed;
use common::queue::Queue;
use common::returning::Returning;
use common::ring::{Addresses, Ring, Vring};
use common::session::{Session, feature};
use common::writable;

const QUEUES: usize = 2;
const QUEUE_SIZE: u16 = 128;

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
    /// Whether it has a writable layer. Then its front-end writes as much as it reads, and its
    /// lower layers are left whole.
    pub writable: bool,
}

/// What keeps a queue busy.
enum Work<'i> {
    Reads(Reads<'i>),
    /// A writable device's.
    Changes(Mixed),
}

impl Work<'_> {
    fn vring(&self) -> Vring {
        match self {
            Work::Reads(reads) => reads.load.ring.vring.clone(),
            Work::Changes(mixed) => mixed.queue.ring.vring.clone(),
        }
    }

    /// Does a number of requests, and waits for the last answer.
    fn turn(&mut self, counts: &Counts) {
        match self {
            Work::Reads(reads) => reads.turn(counts),
            Work::Changes(mixed) => changes::turn(mixed, counts),
        }
    }
}

/// What makes the trouble.
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
                self.counts.kills.add(1);
            }
            1 if self.plan.restarts => {
                assert_eq!(self.daemon.terminate().code(), Some(0));
                self.daemon.restart();
                self.counts.stops.add(1);
            }
            2 if !self.plan.writable => self.cut_layer(),
            3 => self.cut_memory(),
            4..=5 => self.change_memory(),
            _ => {
                // Sometimes the old connection stands until the new one is there.
                let _old = self.session.take().filter(|_| self.random.coin());
                self.connect();
                self.counts.reconnects.add(1);
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
        self.counts.layer_cuts.add(1);
    }

    /// Another front-end takes over and cuts its memory: the device is free again for ours.
    fn cut_memory(&mut self) {
        self.session = None;
        let mut guest = Guest::boot(self.daemon.connect(), Options::default()).expect("guest");
        match self.plan.writable {
            // Ours are under way to write there.
            true => drop(guest.read(0, 0, 4096)),
            false => guest.assert_reads(0, &self.image.content),
        }
        for region in &guest.memory.regions {
            region.file().set_len(0).expect("cut");
        }
        guest.queues[0].ring.vring.kick.write(1).expect("kick");
        let start = Instant::now();
        while guest.session.frontend.get_queue_num().is_ok() {
            assert!(start.elapsed() < PATIENCE, "a guest without memory goes on");
            thread::sleep(Duration::from_millis(1));
        }
        self.counts.memory_cuts.add(1);
    }

    /// All that was answered is there, also after a crash; and after a flush, also without what
    /// only lasts as long as the system runs.
    fn verify_all(mut self, work: &[Work], folder: &Path) {
        self.session = None;
        let mut model = self.image.content.to_vec();
        for work in work {
            if let Work::Changes(mixed) = work {
                mixed.merge_into(&mut model);
            }
        }
        let verify = |daemon: &Daemon| {
            let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
            changes::verify(&mut guest, &model, self.counts);
            guest.flush(0);
        };
        verify(&self.daemon);
        self.daemon.kill();
        self.daemon.restart();
        verify(&self.daemon);
        self.daemon.kill();
        writable::forget_journal(folder);
        self.daemon.restart();
        verify(&self.daemon);
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
        self.counts.memory_changes.add(1);
    }
}

/// The queues of a device.
fn work<'i>(
    plan: &'i Plan,
    image: &'i Image,
    memory: &Memory,
    faults: &'i Faults,
    seed: u64,
) -> Vec<Work<'i>> {
    let event_idx = Returning::wanted().features & feature::EVENT_IDX != 0;
    let queue = |index: usize| {
        let random = Random::new(seed + 1 + index as u64);
        if plan.writable {
            let queue = Queue::new(memory, QUEUE_SIZE, event_idx);
            let model = image.content.to_vec();
            let mut mixed = Mixed::new(queue, memory, model, (index, QUEUES), changes::DEPTH);
            mixed.random = random;
            return Work::Changes(mixed);
        }
        let at = Addresses::alloc(memory, QUEUE_SIZE, [index; 3]);
        let ring = Ring::new(memory, at, QUEUE_SIZE, event_idx);
        Work::Reads(Reads {
            load: Load::new(ring, memory, index, SHAPES[index]),
            name: plan.name,
            image,
            faults,
            random,
        })
    };
    (0..QUEUES).map(queue).collect()
}

/// Runs a device until `end`; its writable layer is made in `folder`.
pub fn run(
    plan: &Plan,
    image: &Image,
    folder: &Path,
    end: Instant,
    seed: u64,
    counts: &Counts,
) -> Health {
    let memory = Memory::typical();
    let faults = Faults::default();
    let work = work(plan, image, &memory, &faults, seed);
    let vrings = work.iter().map(Work::vring).collect();
    let mut options = plan.options.to_vec();
    if plan.writable {
        options.extend(["--upper-auto", folder.to_str().expect("UTF-8")]);
    }
    let mut controller = Controller {
        image,
        plan,
        daemon: Daemon::with(&image.files, &options),
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
    let work: Vec<_> = thread::scope(|scope| {
        let busy = work.into_iter().map(|mut work| {
            let stop = &stop;
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    work.turn(counts);
                }
                work
            })
        });
        let busy: Vec<_> = busy.collect();
        {
            // The queues come to rest in any case.
            let _stop = Raise(&stop);
            while Instant::now() < end {
                controller.pause(Duration::from_millis(400));
                controller.disturb();
                health.sample(&controller.daemon);
            }
        }
        let ended = busy.into_iter().map(|queue| queue.join());
        ended
            .map(|work| work.expect("a queue's requests"))
            .collect()
    });
    if plan.writable {
        controller.verify_all(&work, folder);
    }
    health
}

struct Raise<'f>(&'f AtomicBool);

impl Drop for Raise<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
