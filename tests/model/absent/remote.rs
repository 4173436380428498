//! Layers whose bytes are fetched on demand: a file with holes, a map of what is present, and a
//! fetcher that does what a test tells it.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::PATIENCE;
use ovbd_vhost::source::{Blob, FetchError, FetchErrorKind, LayerRef, Presence, Ticket, Waker};

/// Bytes that are present or absent together.
pub const UNIT: u64 = 16 << 10;

/// Bytes at the end of the file that stay present: they show that the file was not cut short.
const TAIL: u64 = 2 * UNIT;

/// How often a unit is fetched again before its damage is accepted.
const MAX_REJECTS: usize = 3;

/// What the fetcher does with what it is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behavior {
    /// Delivers before the request returns.
    AtOnce,
    /// Keeps it until the test delivers it.
    Hold,
    /// Refuses it.
    Refuse,
    /// Says that it was fetched, and delivers nothing.
    Lie,
    /// Delivers wrong bytes so many more times, then the right ones.
    Damage(usize),
}

struct Asked {
    offset: u64,
    len: u64,
    waker: Arc<Waker>,
    ticket: Ticket,
}

/// A layer that is fetched.
pub struct Remote {
    content: Vec<u8>,
    file: File,
    present: Vec<AtomicBool>,
    behavior: Mutex<Behavior>,
    asked: Mutex<VecDeque<Asked>>,
    /// Ranges that were suggested.
    pub ahead: AtomicUsize,
    rejects: AtomicUsize,
}

impl std::fmt::Debug for Remote {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Remote").finish_non_exhaustive()
    }
}

/// What a blob knows of its layer.
#[derive(Debug)]
struct Map(Arc<Remote>);

impl Remote {
    /// The layer that `path` holds, of which nothing is present, and a blob of it.
    pub fn new(path: &Path) -> (Arc<Remote>, Blob) {
        let content = std::fs::read(path).expect("layer");
        let file = tempfile::tempfile().expect("file");
        file.set_len(content.len() as u64).expect("length");
        let units = content.len().div_ceil(UNIT as usize);
        let remote = Arc::new(Remote {
            file: file.try_clone().expect("descriptor"),
            present: (0..units).map(|_| AtomicBool::new(false)).collect(),
            behavior: Mutex::new(Behavior::AtOnce),
            asked: Mutex::default(),
            ahead: AtomicUsize::new(0),
            rejects: AtomicUsize::new(0),
            content,
        });
        let len = remote.content.len() as u64;
        let map = Arc::new(Map(remote.clone()));
        let blob = Blob::partial(LayerRef::from(path), file, len, map);
        (remote, blob)
    }

    /// Changes what the fetcher does from now on.
    pub fn set(&self, behavior: Behavior) {
        *self.behavior.lock().unwrap() = behavior;
    }

    /// Makes the units absent for which `absent` says so: their bytes are zeros then.
    pub fn forget(&self, mut absent: impl FnMut(u64) -> bool) {
        let len = self.content.len() as u64;
        for (unit, present) in (0u64..).zip(&self.present) {
            let start = unit * UNIT;
            if start + UNIT + TAIL <= len && absent(unit) {
                present.store(false, Ordering::Release);
                let hole = vec![0; UNIT as usize];
                self.file.write_all_at(&hole, start).expect("hole");
            }
        }
    }

    /// Requests that were asked for and neither delivered nor refused.
    pub fn waiting(&self) -> usize {
        self.asked.lock().unwrap().len()
    }

    /// Delivers a waiting request, of many the one that `pick` names; returns whether one waited.
    pub fn deliver(&self, pick: u64) -> bool {
        let asked = {
            let mut asked = self.asked.lock().unwrap();
            match asked.len() as u64 {
                0 => return false,
                len => asked.swap_remove_back((pick % len) as usize).unwrap(),
            }
        };
        self.store(asked.offset, asked.len, &self.content);
        asked.waker.finish(asked.ticket, Ok(()));
        true
    }

    fn units_of(&self, offset: u64, len: u64) -> &[AtomicBool] {
        &self.present[(offset / UNIT) as usize..(offset + len).div_ceil(UNIT) as usize]
    }

    fn store(&self, offset: u64, len: u64, content: &[u8]) {
        let start = offset / UNIT * UNIT;
        let end = (offset + len).next_multiple_of(UNIT);
        let end = end.min(content.len() as u64);
        let bytes = &content[start as usize..end as usize];
        self.file.write_all_at(bytes, start).expect("bytes");
        for unit in self.units_of(offset, len) {
            unit.store(true, Ordering::Release);
        }
    }
}

impl Presence for Map {
    fn is_present(&self, offset: u64, len: u64) -> bool {
        let units = self.0.units_of(offset, len);
        units.iter().all(|unit| unit.load(Ordering::Acquire))
    }

    fn request(&self, offset: u64, len: u64, waker: &Arc<Waker>, ticket: Ticket) {
        let remote = &*self.0;
        let mut behavior = remote.behavior.lock().unwrap();
        match &mut *behavior {
            Behavior::Hold => {
                let asked = Asked {
                    offset,
                    len,
                    waker: waker.clone(),
                    ticket,
                };
                remote.asked.lock().unwrap().push_back(asked);
            }
            Behavior::Refuse => {
                let error = FetchError::new(FetchErrorKind::Unreachable, "no registry");
                waker.finish(ticket, Err(error));
            }
            Behavior::Lie => waker.finish(ticket, Ok(())),
            Behavior::Damage(times @ 1..) => {
                *times -= 1;
                let wrong: Vec<u8> = remote.content.iter().map(|byte| byte ^ 1).collect();
                remote.store(offset, len, &wrong);
                waker.finish(ticket, Ok(()));
            }
            Behavior::AtOnce | Behavior::Damage(0) => {
                remote.store(offset, len, &remote.content);
                waker.finish(ticket, Ok(()));
            }
        }
    }

    fn fetch_ahead(&self, _offset: u64, _len: u64) {
        self.0.ahead.fetch_add(1, Ordering::Relaxed);
    }

    fn reject(&self, offset: u64, len: u64) -> bool {
        if self.0.rejects.fetch_add(1, Ordering::Relaxed) >= MAX_REJECTS {
            return false;
        }
        for unit in self.0.units_of(offset, len) {
            unit.store(false, Ordering::Release);
        }
        true
    }

    fn patience(&self) -> Duration {
        PATIENCE
    }
}
