//! The subreads of one read: those to come, in the order of the plan, and those that are pending.
#![cfg_attr(not(test), warn(clippy::indexing_slicing))]

use super::fetches::Fetching;
use super::read_plan::{ReadPlan, Subread};
use crate::units::SectorRange;
use crate::writable::{Lookup, Volume};

/// Most pending subreads of one read, so that a large read leaves room for others.
const MAX_PENDING: usize = 16;

/// How the bytes of a pending subread come into memory.
#[derive(Debug)]
pub enum SubreadState {
    /// It waits for room, in the queue of [`Storage`](super::storage::Storage) or of
    /// [`Fetches`](super::fetches::Fetches).
    Queued,
    /// The ring reads it.
    Reading {
        /// Bytes read so far.
        filled: usize,
    },
    /// The fetcher was asked for it.
    Fetching(Fetching),
}

/// A subread that was begun and whose bytes are not in guest memory yet.
#[derive(Debug)]
pub struct PendingSubread {
    /// Where its bytes lie.
    pub subread: Subread,
    /// First byte of the request's data that it fills.
    pub position: usize,
    /// How its bytes come into memory.
    pub state: SubreadState,
}

/// The subreads of one read. Its lists keep their memory when it is used for the next read.
#[derive(Debug)]
pub struct Subreads<'a> {
    plan: ReadPlan<'a>,
    /// By slot. The last one is taken, so that the list is empty once nothing is pending.
    pending: Vec<Option<PendingSubread>>,
}

impl<'a> Subreads<'a> {
    /// No subread.
    pub fn new(volume: &'a Volume) -> Self {
        Self {
            plan: ReadPlan::new(volume),
            pending: Vec::new(),
        }
    }

    /// Plans to read a range, which lies on the disk. The last read has finished.
    #[inline]
    pub fn plan(&mut self, range: SectorRange) {
        self.plan.begin(range);
    }

    /// The spans that name the data files of subreads.
    #[inline]
    pub fn lookup(&self) -> &Lookup {
        self.plan.lookup()
    }

    /// Plans the next subread, unless it is planned already.
    #[inline]
    pub fn prepare(&mut self) {
        self.plan.prepare();
    }

    /// The prepared subread, and the first byte of the request's data that it fills.
    #[inline]
    pub fn next(&self) -> Option<(&Subread, usize)> {
        self.plan.next()
    }

    /// Takes the prepared subread.
    #[inline]
    pub fn take(&mut self) -> Option<Subread> {
        self.plan.take()
    }

    /// Drops the subreads to come.
    pub fn abandon_plan(&mut self) {
        self.plan.abandon();
    }

    /// Releases the data files, at the end of the read.
    #[inline]
    pub fn clear(&mut self) {
        self.plan.clear();
    }

    /// A slot for one more pending subread.
    #[inline]
    pub fn vacant_slot(&self) -> Option<u8> {
        let vacant = self.pending.iter().position(Option::is_none);
        let slot = vacant.unwrap_or(self.pending.len());
        // At most MAX_PENDING.
        (slot < MAX_PENDING).then_some(slot as u8)
    }

    /// Enters a pending subread in a vacant slot.
    pub fn insert(&mut self, slot: u8, pending: PendingSubread) {
        let slot = usize::from(slot);
        if slot >= self.pending.len() {
            self.pending.resize_with(slot + 1, || None);
        }
        if let Some(vacant) = self.pending.get_mut(slot) {
            *vacant = Some(pending);
        }
    }

    /// The pending subread in `slot`.
    pub fn pending(&self, slot: u8) -> Option<&PendingSubread> {
        self.pending.get(usize::from(slot))?.as_ref()
    }

    /// Changes the state of the pending subread in `slot`.
    pub fn set_state(&mut self, slot: u8, state: SubreadState) {
        if let Some(Some(pending)) = self.pending.get_mut(usize::from(slot)) {
            pending.state = state;
        }
    }

    /// Removes the pending subread in `slot`: it is served, failed, or given up.
    pub fn remove(&mut self, slot: u8) {
        if let Some(taken) = self.pending.get_mut(usize::from(slot)) {
            *taken = None;
        }
        while let Some(None) = self.pending.last() {
            self.pending.pop();
        }
    }

    /// Whether a subread is pending.
    #[inline]
    pub fn is_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Whether a subread waits for room. The read begins no other one then.
    pub fn is_queued(&self) -> bool {
        let mut pending = self.pending.iter().flatten();
        pending.any(|pending| matches!(pending.state, SubreadState::Queued))
    }

    /// Slots of pending subreads whose state is as `is` says.
    pub fn slots(&self, is: impl Fn(&SubreadState) -> bool) -> impl Iterator<Item = u8> {
        let slots = (0u8..).zip(&self.pending);
        slots.filter_map(move |(slot, pending)| {
            let pending = pending.as_ref()?;
            is(&pending.state).then_some(slot)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Image;
    use crate::image::lineage::Lineage;
    use crate::image::pieces::Piece;

    fn pending(state: SubreadState) -> PendingSubread {
        PendingSubread {
            subread: Subread::Image(Piece::Zero { len: 512 }),
            position: 0,
            state,
        }
    }

    #[test]
    fn a_read_has_as_many_pending_subreads_as_slots() {
        let volume = Volume::read_only(Image::empty(Lineage::default()));
        let mut subreads = Subreads::new(&volume);
        for slot in 0..16 {
            assert_eq!(subreads.vacant_slot(), Some(slot));
            let filled = slot.into();
            subreads.insert(slot, pending(SubreadState::Reading { filled }));
        }
        assert_eq!(subreads.vacant_slot(), None);
        for slot in [3, 15, 14] {
            subreads.remove(slot);
        }
        assert_eq!(subreads.vacant_slot(), Some(3));
        assert!(subreads.pending(14).is_none());
        let found = subreads.pending(13).map(|pending| &pending.state);
        assert!(matches!(found, Some(SubreadState::Reading { filled: 13 })));
        (0..16).for_each(|slot| subreads.remove(slot));
        assert!(!subreads.is_pending());
    }

    #[test]
    fn a_queued_subread_is_found_until_it_goes_on() {
        let volume = Volume::read_only(Image::empty(Lineage::default()));
        let mut subreads = Subreads::new(&volume);
        subreads.insert(0, pending(SubreadState::Reading { filled: 0 }));
        assert!(!subreads.is_queued());
        subreads.insert(1, pending(SubreadState::Queued));
        assert!(subreads.is_queued());
        let is_reading = |state: &SubreadState| matches!(state, SubreadState::Reading { .. });
        assert_eq!(subreads.slots(is_reading).collect::<Vec<_>>(), [0]);
        subreads.set_state(1, SubreadState::Reading { filled: 7 });
        assert!(!subreads.is_queued() && subreads.is_pending());
        assert_eq!(subreads.slots(is_reading).collect::<Vec<_>>(), [0, 1]);
    }
}
