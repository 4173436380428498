//! Completing a blob: verify its digest, then give it its final name.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;

use super::entry::is_at;
use super::layout::{self, sync_dir};
use super::lock::lock;
use super::{Error, Partial, list};
use crate::format::digest::Digest;
use crate::format::presence::State;

/// Publication of an attempt to complete a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Publication {
    /// The blob is complete, verified, and has its final name.
    Published,
    /// Units are missing.
    Incomplete,
    /// Another thread or process writes units or verifies the blob; ask again later.
    Busy,
    /// The blob's bytes have another digest. All units are absent now, and [`Partial::is_restarted`]
    /// holds. Readers with open descriptors see the bytes that are stored next.
    Mismatch {
        /// Digest of the bytes.
        found: Digest,
    },
}

impl Partial {
    /// Verifies a blob of which all units are present, and moves it to the complete ones. Reads
    /// all of it. Readers with open descriptors go on with them.
    ///
    /// # Errors
    /// [`Error::File`], [`Error::Full`] and [`Error::Locked`] if the system fails; the blob stays
    /// partial, and the call may be repeated.
    pub fn publish(&self) -> Result<Publication, Error> {
        // Nothing is stored meanwhile: what is hashed is what is published.
        let Some(turn) = self.try_turn() else {
            return Ok(Publication::Busy);
        };
        let all = self.identity().all_units();
        let published = self.exclusively(&turn, all, || self.publish_quiet());
        Ok(published?.unwrap_or(Publication::Busy))
    }

    /// Publishes the blob. The caller holds all units exclusively.
    fn publish_quiet(&self) -> Result<Publication, Error> {
        let identity = *self.identity();
        match self.map().state() {
            Some(State::Complete) => return Ok(Publication::Published),
            _ => self.check_open()?,
        }
        if !self.is_full() {
            return Ok(Publication::Incomplete);
        }
        let path = self.layout.data(&identity);
        let found = list::digest_of(&self.data).map_err(Error::file("read", &path))?;
        if found != identity.digest() {
            self.restart()?;
            return Ok(Publication::Mismatch { found });
        }
        // A sync that failed meanwhile reported what it lost, and this one would not.
        let _syncing = self.syncing();
        if !self.is_full() {
            return Ok(Publication::Incomplete);
        }
        self.data.sync_all().map_err(Error::file("sync", &path))?;
        self.rename()?;
        Ok(Publication::Published)
    }

    fn rename(&self) -> Result<(), Error> {
        let identity = self.identity();
        let (from, to) = (
            self.layout.data(identity),
            self.layout.blob(&identity.digest()),
        );
        let _lock = lock(&self.layout)?;
        if is_at(&self.data, &from)? {
            let read_only = Permissions::from_mode(0o444);
            self.data
                .set_permissions(read_only)
                .map_err(Error::file("chmod", &from))?;
            fs::rename(&from, &to).map_err(Error::file("rename", &from))?;
            sync_dir(&self.layout.blobs())?;
            self.map().set_state(State::Complete);
            layout::remove(&self.layout.map(identity))?;
            return sync_dir(&self.layout.partials());
        }
        // Removed by hand: what is open can still be read.
        self.map().set_state(State::Complete);
        Ok(())
    }
}
