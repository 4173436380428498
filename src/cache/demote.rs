//! Making a complete blob partial again, because some of its bytes are damaged on storage.
//!
//! The file keeps its inode: processes that read the blob see the bytes that replace the damaged ones.
//! ```text
//! blobs/HEX  --1. create the map, all units present but the damaged ones, and sync it
//!            --2. rename--> partial/HEX-LEN.data --fetch the damaged units, verify--> blobs/HEX
//! ```
//! A crash between the steps leaves a complete blob, and a map without data, which opening removes.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use super::entry::{Entry, is_at, same_file};
use super::layout::{self, sync_dir};
use super::{Cache, Error, Partial, list};
use crate::format::presence::{Identity, UnitRange};
use crate::source::presence::Bitmap;

/// Publication of [`Cache::demote`].
#[derive(Debug)]
pub enum Demotion {
    /// The blob has its digest: it is not damaged.
    Intact,
    /// The blob is partial; the damaged units are absent.
    Demoted(Arc<Partial>),
    /// The file of the entry is in the cache no more.
    Removed,
}

impl Cache {
    /// Makes the complete blob of `entry` partial, without the `damaged` units, unless it still has its
    /// digest. Reads all of it.
    ///
    /// # Errors
    /// [`Error::Full`], [`Error::File`], [`Error::Locked`] and [`Error::Map`] if the system fails; the blob
    /// stays as it is.
    pub fn demote(
        &self,
        entry: &Entry,
        identity: &Identity,
        damaged: UnitRange,
    ) -> Result<Demotion, Error> {
        let file = match entry {
            Entry::Complete(file) => file,
            Entry::Partial(partial) => &partial.data,
        };
        // Bytes that cannot be read are damaged as well.
        if list::digest_of(file).is_ok_and(|found| found == identity.digest()) {
            return Ok(Demotion::Intact);
        }
        let _lock = self.lock()?;
        if is_at(file, &self.layout.blob(&identity.digest()))? {
            let begun = self.begin_map(identity, damaged);
            if let Err(error) = begun.and_then(|()| self.move_back(file, identity)) {
                layout::remove(&self.layout.map(identity))?;
                return Err(error);
            }
        }
        // Another process may have done so before.
        match self.existing(identity)? {
            Some(partial) if same_file(&partial.data, file)? => {
                Ok(Demotion::Demoted(Arc::new(partial)))
            }
            _ => Ok(Demotion::Removed),
        }
    }

    /// Makes a map that has all units but the damaged ones, and makes it durable.
    fn begin_map(&self, identity: &Identity, damaged: UnitRange) -> Result<(), Error> {
        // Left by a process that was killed between the steps.
        layout::remove(&self.layout.map(identity))?;
        let (map_file, map) = self.create_map(identity)?;
        let all = identity.all_units();
        for present in [
            UnitRange::new(all.start(), damaged.start()),
            UnitRange::new(damaged.end(), all.end()),
        ] {
            map.mark(Bitmap::Live, present);
            map.mark(Bitmap::Durable, present);
        }
        let path = self.layout.map(identity);
        map_file.sync_all().map_err(Error::file("sync", &path))?;
        sync_dir(&self.layout.partials())
    }

    fn move_back(&self, file: &File, identity: &Identity) -> Result<(), Error> {
        let (from, to) = (
            self.layout.blob(&identity.digest()),
            self.layout.data(identity),
        );
        let writable = Permissions::from_mode(0o600);
        file.set_permissions(writable)
            .map_err(Error::file("chmod", &from))?;
        fs::rename(&from, &to).map_err(Error::file("rename", &from))?;
        sync_dir(&self.layout.partials())?;
        sync_dir(&self.layout.blobs())
    }
}
