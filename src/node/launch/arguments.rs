//! The command line of a disk process.

use std::ffi::OsString;

use super::super::entry::Entry;
use super::super::spec::Content;
use super::Launcher;

/// Directory of the fetcher of all disks, below the run directory. No disk has such an id.
const FETCHER: &str = ".fetcher";

impl Launcher {
    /// Returns the arguments of the process of `entry`.
    pub(super) fn arguments(&self, entry: &Entry) -> Vec<OsString> {
        let mut arguments = self.options.clone();
        let mut option = |name: &str, value: OsString| arguments.extend([name.into(), value]);
        option("--control", self.control(&entry.id).into());
        option("--stats", self.stats(&entry.id).into());
        option("--shared-fetcher", self.run_dir.join(FETCHER).into());
        match &entry.content {
            Content::Image(reference) => option("--image", reference.into()),
            Content::Config(path) => option("--config", path.into()),
            Content::Layers(layers) => layers
                .iter()
                .for_each(|layer| option("--layer", layer.into())),
        }
        if let Some(dir) = &entry.upper {
            option("--upper-auto", dir.into());
        }
        let spec = &entry.spec;
        if let Some(limit) = spec.upper_limit {
            option("--upper-limit", limit.to_string().into());
        }
        if let Some(serial) = &spec.serial {
            option("--serial", serial.into());
        }
        if let Some(queues) = spec.num_queues {
            option("--num-queues", queues.to_string().into());
        }
        if let Some(size) = spec.queue_size {
            option("--queue-size", size.to_string().into());
        }
        if let Some(time) = spec.poll_us {
            option("--poll-us", time.to_string().into());
        }
        if let Some(bytes) = spec.block_cache {
            option("--block-cache", bytes.to_string().into());
        }
        if let Some(action) = spec.on_full {
            option("--on-full", action.word().into());
        }
        if let Some(policy) = spec.takeover {
            option("--takeover", policy.word().into());
        }
        if let Some(trace) = &spec.prefetch {
            option("--prefetch", trace.into());
        }
        let limits = [
            ("--limit-ops", spec.limits.ops),
            ("--limit-bandwidth", spec.limits.bandwidth),
        ];
        for (name, limit) in limits {
            if let Some(limit) = limit {
                option(name, limit.to_string().into());
            }
        }
        arguments
    }
}
