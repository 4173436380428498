//! What was done to the files of a folder, and what a crash may leave of it.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::Path;

/// Something done to a file, named by its number, or to the folder.
#[derive(Clone, Debug)]
pub enum Op {
    /// A new, empty file.
    Create {
        /// Its name.
        name: OsString,
        /// Its number.
        file: u64,
    },
    /// A write.
    Write {
        /// The file.
        file: u64,
        /// Position of the first byte.
        at: usize,
        /// What was written.
        bytes: Vec<u8>,
    },
    /// A change of the length, by `ftruncate`.
    Resize {
        /// The file.
        file: u64,
        /// The new length in bytes.
        len: usize,
    },
    /// A hole or zeros, by `fallocate`.
    Zero {
        /// The file.
        file: u64,
        /// Position of the first byte.
        at: usize,
        /// Bytes that are zero now.
        len: usize,
    },
    /// An `fsync` of a file.
    Sync {
        /// The file.
        file: u64,
    },
    /// An `fsync` of a file that failed. The system lets go of what it could not store, and says no
    /// more about it: some of what was written since the last sync is gone.
    LostSync {
        /// The file.
        file: u64,
        /// What is left of it, which is durable.
        content: Vec<u8>,
    },
    /// A new name in place of the old one.
    Rename {
        /// The old name.
        from: OsString,
        /// The new name.
        to: OsString,
    },
    /// A further name.
    Link {
        /// The file.
        file: u64,
        /// The further name.
        name: OsString,
    },
    /// A name that is gone.
    Remove {
        /// The name.
        name: OsString,
    },
    /// An `fsync` of the folder.
    SyncFolder,
}

/// What a folder of files holds.
#[derive(Clone, Debug, Default)]
pub(super) struct Files {
    pub(super) names: BTreeMap<OsString, u64>,
    pub(super) content: BTreeMap<u64, Vec<u8>>,
}

impl Files {
    pub(super) fn apply(&mut self, op: &Op) {
        match op {
            Op::Create { name, file } => {
                self.names.insert(name.clone(), *file);
                self.content.entry(*file).or_default();
            }
            Op::Write { file, at, bytes } => {
                let content = self.content.entry(*file).or_default();
                if content.len() < at + bytes.len() {
                    content.resize(at + bytes.len(), 0);
                }
                content[*at..at + bytes.len()].copy_from_slice(bytes);
            }
            Op::Resize { file, len } => self.content.entry(*file).or_default().resize(*len, 0),
            Op::Zero { file, at, len } => {
                let content = self.content.entry(*file).or_default();
                let end = (at + len).min(content.len());
                content[(*at).min(end)..end].fill(0);
            }
            Op::Rename { from, to } => {
                if let Some(file) = self.names.remove(from) {
                    self.names.insert(to.clone(), file);
                }
            }
            Op::Link { file, name } => {
                self.names.insert(name.clone(), *file);
            }
            Op::Remove { name } => {
                self.names.remove(name);
            }
            Op::LostSync { file, content } => {
                self.content.insert(*file, content.clone());
            }
            Op::Sync { .. } | Op::SyncFolder => {}
        }
    }
}

/// What is left when the process dies: everything.
pub fn after_kill(log: &[Op], into: &Path) {
    let mut files = Files::default();
    log.iter().for_each(|op| files.apply(op));
    files.write(into);
}

/// What may be left when the power fails: what was synced, and of the rest, what `survives` says,
/// asked for each sector written and each other change.
pub fn after_power_loss(log: &[Op], into: &Path, mut survives: impl FnMut() -> bool) {
    let mut durable = Files::default();
    let mut pending: Vec<&Op> = Vec::new();
    for op in log {
        if let Op::LostSync { file, .. } = op {
            pending.retain(|op| op.file() != Some(*file));
            durable.apply(op);
            continue;
        }
        let settles: &dyn Fn(&Op) -> bool = match op {
            Op::Sync { file } => &|op| op.file() == Some(*file),
            Op::SyncFolder => &|op| op.file().is_none(),
            _ => {
                pending.push(op);
                continue;
            }
        };
        pending.retain(|op| {
            let settled = settles(op);
            if settled {
                durable.apply(op);
            }
            !settled
        });
    }
    let mut names_in_order = true;
    for op in pending {
        match op {
            Op::Write { .. } => {
                let stored = op.sectors().filter(|_| survives());
                stored.for_each(|sector| durable.apply(&sector));
            }
            op if op.file().is_some() => {
                if survives() {
                    durable.apply(op);
                }
            }
            // A file system keeps changes of names in order.
            op => {
                names_in_order &= survives();
                if names_in_order {
                    durable.apply(op);
                }
            }
        }
    }
    durable.write(into);
}

impl Op {
    /// The file whose content it changes.
    pub(super) fn file(&self) -> Option<u64> {
        match self {
            Op::Write { file, .. } | Op::Resize { file, .. } | Op::Zero { file, .. } => Some(*file),
            _ => None,
        }
    }

    /// A write as several: each up to the end of a sector of the file.
    pub(super) fn sectors(&self) -> impl Iterator<Item = Op> {
        let parts = match self {
            Op::Write { file, at, bytes } => Some((*file, *at, bytes)),
            _ => None,
        };
        parts.into_iter().flat_map(|(file, at, bytes)| {
            let mut done = 0;
            std::iter::from_fn(move || {
                let part = (512 - (at + done) % 512).min(bytes.len() - done);
                let bytes = bytes[done..done + part].to_vec();
                done += part;
                let at = at + done - part;
                (part > 0).then_some(Op::Write { file, at, bytes })
            })
        })
    }
}

impl Files {
    fn write(&self, into: &Path) {
        for (name, file) in &self.names {
            let content = self.content.get(file).map_or(&[][..], |content| content);
            fs::write(into.join(name), content).unwrap();
        }
    }
}
