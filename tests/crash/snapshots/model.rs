//! What a disk and its snapshots hold, before and after a change of the snapshots.

use std::error::Error;
use std::fs;
use std::num::NonZero;
use std::path::Path;
use std::sync::Arc;

use common::recorder::Recorder;
use indicatif::ProgressBar;
use ovbd_vhost::format::lsmt::writable::Kind;
use ovbd_vhost::image::config::Stack;
use ovbd_vhost::tool::snapshots::{delete, roll_back};
use ovbd_vhost::units::Sector;
use ovbd_vhost::writable::manifest::Pairs;
use ovbd_vhost::writable::{Options, Snapshots, Volume, at_rest};

use crate::disk::{Content, assert_holds, content, make, paths, write};

const SECTORS: u64 = 24;

/// A change of the snapshots of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// By a process that serves the disk.
    Take,
    /// Of the snapshot at this place in the list.
    Delete(usize),
    RollBack(usize),
}

impl Change {
    /// Makes the change to the disk in `folder`, which is as `model` says.
    pub(crate) fn apply(self, folder: &Path, model: &Model) -> Result<(), Box<dyn Error>> {
        let name = |at: usize| &model.snapshots[at].0;
        match self {
            Self::Take => {
                let (_volume, snapshots) = open(folder)?;
                snapshots.take("taken")?;
            }
            Self::Delete(at) => {
                let threads = NonZero::<usize>::MIN;
                delete(&paths(folder), name(at), threads, &ProgressBar::hidden())?;
            }
            Self::RollBack(at) => drop(roll_back(&paths(folder), name(at), true)?),
        }
        Ok(())
    }
}

/// A disk with snapshots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Model {
    disk: Vec<Content>,
    /// Names and content, oldest first.
    snapshots: Vec<(String, Vec<Content>)>,
}

fn open(folder: &Path) -> Result<(Arc<Volume>, Snapshots), ovbd_vhost::writable::Error> {
    common::volume::open(&Stack::default(), &paths(folder), Options::default())
}

impl Model {
    /// Makes a disk with so many snapshots, of which the last is not sealed; all is durable.
    pub(crate) fn make(recorder: &Recorder, kind: Kind, snapshots: usize) -> Self {
        make(recorder, kind, SECTORS);
        let (volume, list) = open(recorder.path()).unwrap();
        let change = |number: u64| {
            let tag = number as u8 + 1;
            write(&volume, Sector(number * 3), &mut [[tag; 512]; 5]).unwrap();
            write(&volume, Sector(20), &mut [[tag; 512]; 3]).unwrap();
            let discarded = common::sectors(number * 5, 2);
            volume.discard(discarded).unwrap();
        };
        let mut taken = Vec::new();
        for number in 0..snapshots {
            change(number as u64);
            let name = format!("s{number}");
            list.take(&name).unwrap();
            taken.push((name, content(&volume)));
            if number + 1 < snapshots {
                list.seal().unwrap();
            }
        }
        change(snapshots as u64);
        volume.flush().unwrap();
        Self {
            disk: content(&volume),
            snapshots: taken,
        }
    }

    /// What the disk in `folder` is now.
    pub(crate) fn find(folder: &Path) -> Self {
        let (volume, snapshots) = open(folder).unwrap();
        let held = |snapshot: ovbd_vhost::writable::Snapshot| {
            let stack = Stack::new(&snapshot.layers);
            let image = ovbd_vhost::image::Image::open(&stack).unwrap();
            (snapshot.name, content(&Volume::read_only(image)))
        };
        Self {
            snapshots: snapshots.list().into_iter().map(held).collect(),
            disk: content(&volume),
        }
    }

    /// What the disk is after a change.
    pub(crate) fn after(&self, change: Change) -> Self {
        let mut after = self.clone();
        match change {
            Change::Take => after
                .snapshots
                .push(("taken".to_owned(), self.disk.clone())),
            Change::Delete(at) => drop(after.snapshots.remove(at)),
            Change::RollBack(at) => {
                after.disk.clone_from(&self.snapshots[at].1);
                after.snapshots.truncate(at + 1);
            }
        }
        after
    }

    /// Asserts that the disk in `folder` is as it was or as it is after `change`, completes the change, and asserts
    /// that it is as after the change then. Returns whether it was already.
    pub(crate) fn finish(&self, folder: &Path, change: Change, when: &dyn Fn() -> String) -> bool {
        let after = self.after(change);
        let names: Vec<_> = at_rest::list(&paths(folder)).unwrap();
        let names: Vec<_> = names.into_iter().map(|found| found.name).collect();
        let is_new = names == after.names();
        // A rollback to the last snapshot does not change the list.
        let is_new = match names == self.names() {
            true if is_new => content(&open(folder).unwrap().0) == after.disk,
            _ => is_new,
        };
        if !is_new {
            self.assert_found(folder, when);
            let done = change.apply(folder, self);
            done.unwrap_or_else(|error| panic!("{}: again: {error}", when()));
        }
        after.assert_found(folder, when);
        is_new
    }

    fn names(&self) -> Vec<&str> {
        self.snapshots.iter().map(|(name, _)| &**name).collect()
    }

    /// Asserts that the next process finds this disk in `folder`, and leaves no file that is not part of it.
    pub(crate) fn assert_found(&self, folder: &Path, when: &dyn Fn() -> String) {
        let opened = open(folder);
        let (volume, snapshots) = opened.unwrap_or_else(|error| panic!("{}: {error}", when()));
        let names: Vec<_> = snapshots
            .list()
            .into_iter()
            .map(|found| found.name)
            .collect();
        assert_eq!(names, self.names(), "{}", when());
        assert!(content(&volume) == self.disk, "{}: the disk", when());
        // A process that opens them waits until they are sealed.
        snapshots.seal().unwrap();
        for (name, held) in &self.snapshots {
            assert_holds(&snapshots, name, held, when);
        }
        drop((volume, snapshots));
        let pairs = Pairs::read(&paths(folder)).unwrap();
        let active = pairs.active();
        let journals = ovbd_vhost::writable::journal::paths(&active.index);
        let mut own: Vec<_> = pairs
            .frozen()
            .iter()
            .map(|pair| pair.data.clone())
            .collect();
        own.extend([active.data.clone(), active.index.clone()]);
        own.extend(journals);
        own.push(folder.join("data.snapshots"));
        for file in fs::read_dir(folder).unwrap() {
            let path = file.unwrap().path();
            assert!(
                own.contains(&path),
                "{}: {} is left",
                when(),
                path.display()
            );
        }
    }
}
