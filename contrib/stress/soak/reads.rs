//! Reads at random from a device whose layers are cut now and then, each judged.

use std::cell::RefCell;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::atomic::{AtomicU64, Ordering};

use super::counts::Counts;
use super::images::Image;
use common::blk::{IOERR, OK, SECTOR};
use common::content::Random;
use common::load::{Load, Shape};

/// One shape of reads for each queue.
pub const SHAPES: [Shape; 2] = [
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

/// Reads in one turn.
const TURN: u64 = 500;

/// A layer is cut while this is odd: reads that began or ended then may fail.
#[derive(Default)]
pub struct Faults(AtomicU64);

impl Faults {
    fn now(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }

    /// A cut begins, or ends.
    pub fn turn(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    fn excuse(&self, began: u64) -> bool {
        began % 2 == 1 || began != self.now()
    }
}

/// One queue that reads.
pub struct Reads<'i> {
    /// The queue.
    pub load: Load,
    /// The device it is one of, for messages.
    pub name: &'static str,
    /// What must be read.
    pub image: &'i Image,
    /// When reads may fail.
    pub faults: &'i Faults,
    /// Where to read next.
    pub random: Random,
}

impl Reads<'_> {
    /// Reads for a while, and waits for the last answer.
    pub fn turn(&mut self, counts: &Counts) {
        let Self {
            load,
            name,
            image,
            faults,
            random,
        } = self;
        let len = load.shape().len as usize;
        let last = (image.content.len() - len) as u64 / SECTOR;
        // For each sector being read: how often, and when the first of these reads began.
        let began: RefCell<HashMap<u64, (u32, u64)>> = RefCell::default();
        let mut left = TURN;
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
                    return counts.unexpected.add(1);
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
                        true => counts.verified.add(1),
                        false => counts.mismatches.add(1),
                    }
                } else if done.status == IOERR && faults.excuse(began) {
                    counts.failed.add(1);
                } else {
                    counts.unexpected.add(1);
                    let now = faults.now();
                    eprintln!(
                        "{name}: status {} at sector {}, faults {began} to {now}",
                        done.status, done.sector
                    );
                }
            },
        );
    }
}
