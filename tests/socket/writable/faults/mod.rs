//! Storage of a writable layer that fails, vanishes or is used up while it is served: what fails,
//! fails for the requests it hits, what was answered stays, and nothing is ever wrong.

mod limits;
mod snapshots;
mod storage;

use std::fs::{self, File};
use std::path::Path;
use std::thread;
use std::time::Duration;

use common::blk::UNANSWERED;
use common::blk::{DISCARD, FLUSH, IN, IOERR, OK, OUT, SECTOR, WRITE_ZEROES, range};
use common::content::tagged;
use common::daemon::Daemon;
use common::guest::{Guest, Options};
use common::queue::{Layout, Segment};
use common::recorder::{Call, Recorder};
use common::session::{Wanted, feature};
use common::writable::Writable;
use fuser::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, prlimit};
use serde_json::{Value, json};

use super::control::ask;
use super::{assert_beginning, part, write, zero};

/// Sectors of a write.
const LEN: u64 = 16;

/// What storage says.
const ERRNOS: [Errno; 2] = [Errno::EIO, Errno::ENOSPC];

/// A device with a writable layer, and what its disk must hold.
struct Fixture {
    disk: Writable,
    model: Vec<u8>,
    /// Writes made so far.
    round: u64,
}

impl Fixture {
    fn new(disk: Writable) -> Self {
        Self {
            model: disk.content.to_vec(),
            disk,
            round: 0,
        }
    }

    /// One whose layer lies on storage that fails on demand.
    fn on(files: &Recorder) -> Self {
        Self::new(Writable::serve_at(files.path(), &[]))
    }

    fn fresh(&mut self) -> Vec<u8> {
        self.round += 1;
        tagged((LEN * SECTOR) as usize, self.round)
    }

    /// A write that works.
    fn write(&mut self, guest: &mut Guest, sector: u64) {
        let data = self.fresh();
        write(guest, &mut self.model, sector, &data);
    }

    /// A write that fails: each sector is as before or as it would be. Which, is what it is from
    /// now on.
    fn fail_to_write(&mut self, guest: &mut Guest, sector: u64) {
        let data = self.fresh();
        assert_eq!(guest.send(0, OUT, sector, &data), IOERR);
        self.settle(guest, sector, &data);
    }

    /// Takes over which sectors have become `new`.
    fn settle(&mut self, guest: &mut Guest, sector: u64, new: &[u8]) {
        let found = guest.read(0, sector, new.len() as u32);
        let old = part(&mut self.model, sector, new.len() as u64 / SECTOR);
        let sectors = found.chunks(SECTOR as usize);
        let pairs = old.chunks(SECTOR as usize).zip(new.chunks(SECTOR as usize));
        for (at, (now, (old, new))) in (sector..).zip(sectors.zip(pairs)) {
            assert!(now == old || now == new, "sector {at}: neither old nor new");
        }
        old.copy_from_slice(&found);
    }

    /// Asserts that all is well: what is there, what is written, what a crash and a power loss leave.
    fn assert_well(&mut self, guest: &mut Guest) {
        self.disk.daemon.assert_alive();
        assert_beginning(guest, &self.model);
        for sector in [0, 100, 3000] {
            self.write(guest, sector);
        }
        zero(guest, &mut self.model, DISCARD, 105, 3, false);
        zero(guest, &mut self.model, WRITE_ZEROES, 3005, 3, false);
        assert_beginning(guest, &self.model);
        self.disk.crash();
        let mut guest = self.disk.plain_guest();
        assert_beginning(&mut guest, &self.model);
        self.write(&mut guest, 50);
        guest.flush(0);
        self.disk.lose_power();
        assert_beginning(&mut self.disk.plain_guest(), &self.model);
    }
}
