//! The right to fetch and store units of a partial blob.
//!
//! A lock on the units that a process fetches spares others the same request. It does not keep them from storing:
//! a process may be stuck for ever. Each write of a unit, and the verification of a blob, has a lock of its own,
//! which is held for as long as the write takes and no longer. Under that lock, a unit that is present is left
//! alone, unless it is to be replaced: what a slow process fetched from a bad mirror changes no unit that
//! another process stored meanwhile, and none of a verified blob.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::{Error, Partial};
use crate::format::presence::{State, UNIT, UnitRange};
use crate::source::presence::Bitmap;

/// How long a store waits for another process that writes or verifies the same units.
const PATIENCE: Duration = Duration::from_secs(1);
const TICK: Duration = Duration::from_millis(1);

/// The right to store some units of a partial blob, until dropped.
#[derive(Debug)]
pub struct Claim {
    partial: Arc<Partial>,
    units: UnitRange,
    /// Whether no other process fetches these units, unless it claims them anyway.
    is_locked: bool,
    /// State of the blob when the claim was made.
    state: Option<State>,
}

/// What a store does with units that are present.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Present {
    Kept,
    Replaced,
}

impl Claim {
    pub(super) fn new(partial: &Arc<Partial>, units: UnitRange, is_locked: bool) -> Self {
        Self {
            partial: Arc::clone(partial),
            units,
            is_locked,
            state: partial.map().state(),
        }
    }

    /// The blob.
    pub fn partial(&self) -> &Arc<Partial> {
        &self.partial
    }

    /// Writes whole units from `first` on and marks them present. Leaves those alone that are present. Only the
    /// blob's last unit may be shorter than 64 KiB.
    ///
    /// # Errors
    /// [`Error::NotUnits`] if the bytes are not whole claimed units; [`Error::Closed`] if the blob
    /// is complete; [`Error::Restarted`] if its units were dropped since the claim was made;
    /// [`Error::Contended`] if another process writes or verifies them for long; [`Error::Full`] if there is no
    /// room; [`Error::File`] if the system fails; [`Error::Map`] if the map was cut short.
    pub fn store(&self, first: u64, bytes: &[u8]) -> Result<(), Error> {
        self.put(first, bytes, Present::Kept)
    }

    /// Writes whole units as [`Claim::store`] does, also those that are present: they are damaged.
    ///
    /// # Errors
    /// As [`Claim::store`].
    pub fn replace(&self, first: u64, bytes: &[u8]) -> Result<(), Error> {
        self.put(first, bytes, Present::Replaced)
    }

    fn put(&self, first: u64, bytes: &[u8], present: Present) -> Result<(), Error> {
        let units = self.whole_units(first, bytes.len())?;
        let since = Instant::now();
        loop {
            let write = || self.write(units, bytes, present);
            let turn = self.partial.turn();
            if self.partial.exclusively(&turn, units, write)?.is_some() {
                return Ok(());
            }
            drop(turn);
            if since.elapsed() > PATIENCE {
                let digest = self.partial.identity().digest();
                return Err(Error::Contended { digest });
            }
            thread::sleep(TICK);
        }
    }

    /// Writes `units`, of which `bytes` are the bytes. This claim holds them exclusively.
    fn write(&self, units: UnitRange, bytes: &[u8], present: Present) -> Result<(), Error> {
        let partial = &*self.partial;
        if present == Present::Kept && partial.map().holds(Bitmap::Live, units) {
            return Ok(());
        }
        partial.check_open()?;
        // Bytes of a mirror that was trusted when they were asked for.
        if partial.map().state() != self.state {
            let digest = partial.identity().digest();
            return Err(Error::Restarted { digest });
        }
        if present == Present::Replaced {
            return partial.write(units, bytes);
        }
        let start = units.start() * UNIT;
        for run in partial.map().absent(units) {
            let inside = partial.identity().bytes_of(run);
            let part = (inside.start - start) as usize..(inside.end - start) as usize;
            partial.write(run, &bytes[part])?;
        }
        Ok(())
    }

    fn whole_units(&self, first: u64, len: usize) -> Result<UnitRange, Error> {
        let identity = self.partial.identity();
        let offset = first.saturating_mul(UNIT);
        let units = identity.units_of(offset, len as u64);
        let whole = units.filter(|units| {
            let bytes = identity.bytes_of(*units);
            self.units.contains(*units) && bytes.end - bytes.start == len as u64
        });
        whole.ok_or(Error::NotUnits {
            digest: identity.digest(),
            offset,
            len,
        })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.is_locked {
            self.partial.unclaim(self.units);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{content, identity, partial, store};
    use super::super::{Cache, Entry, Publication, list};
    use super::*;
    use crate::format::digest::Digest;

    #[test]
    fn one_process_fetches_a_unit() {
        let dir = tempfile::tempdir().unwrap();
        let (one, other) = (
            Cache::open(dir.path()).unwrap(),
            Cache::open(dir.path()).unwrap(),
        );
        let bytes = content(4 * UNIT, 1);
        let (mine, theirs) = (
            partial(&one, identity(&bytes)),
            partial(&other, identity(&bytes)),
        );
        let claim = mine.claim(UnitRange::new(0, 2)).unwrap().unwrap();
        assert!(theirs.claim(UnitRange::new(1, 3)).unwrap().is_none());
        assert_eq!(theirs.publish().unwrap(), Publication::Incomplete);
        claim.store(0, &bytes[..2 * UNIT as usize]).unwrap();
        drop(claim);
        assert_eq!(
            theirs.map().absent(UnitRange::new(0, 4)),
            [UnitRange::new(2, 4)],
            "seen by the other"
        );
        store(&theirs, &bytes, UnitRange::new(2, 4));
        assert_eq!(theirs.publish().unwrap(), Publication::Published);
        assert_eq!(mine.publish().unwrap(), Publication::Published);
    }

    /// A process that is stuck while it fetches keeps no other from completing the blob, and what it stores in the
    /// end changes nothing.
    #[test]
    fn a_stuck_process_keeps_no_other_away() {
        let dir = tempfile::tempdir().unwrap();
        let [one, other] = [(); 2].map(|()| Cache::open(dir.path()).unwrap());
        let bytes = content(4 * UNIT, 1);
        let [stuck, theirs] = [&one, &other].map(|cache| partial(cache, identity(&bytes)));
        let all = theirs.identity().all_units();
        let wrong = vec![9; 2 * UNIT as usize];
        let late = stuck.claim(UnitRange::new(0, 2)).unwrap().unwrap();
        assert!(theirs.claim(all).unwrap().is_none());
        let claim = theirs.claim_anyway(all);
        claim.store(1, &bytes[UNIT as usize..]).unwrap();
        late.store(0, &wrong).unwrap();
        let first = theirs.map().absent(all);
        assert!(first.is_empty(), "the late process stored the absent unit");
        assert!(matches!(
            theirs.publish().unwrap(),
            Publication::Mismatch { .. }
        ));
        let error = late.store(0, &wrong).unwrap_err();
        assert!(matches!(error, Error::Restarted { .. }), "{error}");
        let error = claim.store(0, &bytes).unwrap_err();
        assert!(matches!(error, Error::Restarted { .. }), "{error}");
        theirs.claim_anyway(all).store(0, &bytes).unwrap();
        assert_eq!(theirs.publish().unwrap(), Publication::Published);
        late.store(0, &wrong).unwrap();
        let error = late.replace(0, &wrong).unwrap_err();
        assert!(matches!(error, Error::Closed { .. }), "{error}");
        let Entry::Complete(file) = other.entry(identity(&bytes)).unwrap() else {
            panic!("not complete");
        };
        assert_eq!(list::digest_of(&file).unwrap(), Digest::of(&bytes));
    }
}
