//! Writes, from guest memory into the page cache at once. A write that needs a flush first is repeated after
//! it, and one that waits for space in the storage from time to time.
//!
//! The functions are not inlined, to keep the loop small for reads.
#![cfg_attr(not(test), warn(clippy::indexing_slicing))]

use super::QueueWorker;
use super::paused::Paused;
use super::unfinished_write::UnfinishedWrite;
use crate::engine::full_storage::SpaceWait;
use crate::engine::request::Request;
use crate::reason::reason;
use crate::units::SectorRange;
use crate::virtio::config::writes_through;
use crate::virtio::status::Status;

impl<'a> QueueWorker<'a> {
    /// Whether writes must be durable before they are answered.
    pub(super) fn writes_through(&self) -> bool {
        writes_through(self.features, self.backend.writeback())
    }

    /// Writes the data of a request to a range of the disk.
    #[inline(never)]
    pub(super) fn write(&mut self, request: Request<'a>, range: SectorRange) {
        self.try_write(UnfinishedWrite::new(request, range), None);
    }

    /// Tries a write, which may have waited for space. If it needs a flush first, the flush is offloaded, and the write
    /// repeated after it.
    pub(super) fn try_write(
        &mut self,
        mut write: UnfinishedWrite<'a>,
        wait: Option<SpaceWait<'a>>,
    ) {
        if self.context.is_lost() {
            // Lost memory reads as zeros, which are not the guest's data. The answer is not published.
            return self.finish(write.into_request().answer(Status::IoError));
        }
        // Read before the write: if the driver switches the mode during it, either mode is right.
        let through = self.writes_through();
        let written = self.backend.volume().write_now(write.range(), write.data());
        match written {
            Ok(()) if through => self.flush(write.into_request(), wait),
            Ok(()) => self.finish(write.into_request().answer(Status::Ok)),
            Err(error) if write.may_retry(&error) => self.flush_and_retry(write, wait),
            Err(error) if self.backend.full_storage().pauses_on(&error) => {
                let wait = self.wait_for_space(wait, &reason(&error));
                self.pause(Paused::Write(write, wait));
            }
            Err(error) => {
                self.warn("a write", &error);
                self.finish(write.into_request().answer(Status::IoError));
            }
        }
    }

    /// Goes on with the wait of a request for space, or begins it.
    #[cold]
    pub(super) fn wait_for_space(
        &self,
        wait: Option<SpaceWait<'a>>,
        reason: &str,
    ) -> SpaceWait<'a> {
        wait.unwrap_or_else(|| self.backend.full_storage().begin_wait(reason))
    }
}
