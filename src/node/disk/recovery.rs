//! A disk of an earlier node.

use std::sync::Arc;

use super::{Disk, Kind, Services, State};
use crate::ratelimited_log;

impl Disk {
    /// Takes over the process that a former node started, or starts one. `left` are processes of the disk that run.
    pub async fn recover(&self, left: &[i32], services: &Services) {
        let Some(entry) = self.entry() else { return };
        let found = entry.process.as_ref();
        let found = match found.and_then(|found| services.launcher.find(found)) {
            Some(process) => Some(process),
            // The entry names an earlier process if it could not be written after a restart of the disk.
            None if left.is_empty() => None,
            None => services.launcher.serving(&self.id).await,
        };
        *self.listener() = services.fd_store.take(&self.id);
        if let Some(process) = found {
            *self.process() = Some(Arc::new(process));
            self.status().state = State::Listening;
            services.events.add(&self.id, Kind::Found, None);
            return self.take_back(services).await;
        }
        services.launcher.end_all(&self.id, left).await;
        match self.start_again(services).await {
            Ok(entry) => {
                self.serves();
                self.store_if_possible(entry, services).await;
            }
            Err(failure) => self.fail(services, failure.text),
        }
    }

    /// Takes the listening socket and the report from a process that a former node started.
    async fn take_back(&self, services: &Services) {
        match services.launcher.take_back(&self.id).await {
            Ok((listener, ready)) => {
                self.status().known = ready.into();
                services.fd_store.keep(&self.id, &listener);
                *self.listener() = Some(listener);
            }
            // The disk serves. If its process ends, the next one gets another socket at the same path.
            Err(error) => ratelimited_log::warn(format_args!(
                "disk {}: its process does not give its listening socket: {error}",
                self.id
            )),
        }
    }

    /// Finds the process of a disk whose removal a killed node did not finish, and ends others of `left`.
    pub async fn recover_removal(&self, left: &[i32], services: &Services) {
        let identity = self.entry().and_then(|entry| entry.process);
        let found = identity.and_then(|found| services.launcher.find(&found));
        let own = found.as_ref().map(|process| process.identity().pid);
        *self.process() = found.map(Arc::new);
        let others: Vec<_> = left
            .iter()
            .copied()
            .filter(|pid| Some(*pid) != own)
            .collect();
        services.launcher.end_all(&self.id, &others).await;
    }
}
