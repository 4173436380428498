//! Object `download` of upstream's configurations: background download of whole layers.

use std::time::Duration;

use serde::Deserialize;

/// Time and rate of the background download of a disk's layers.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Download {
    enable: bool,
    delay: u64,
    delay_extra: u64,
    #[serde(rename = "maxMBps")]
    max_mbps: u64,
    try_cnt: u32,
    block_size: u64,
}

impl Default for Download {
    fn default() -> Download {
        Download {
            enable: false,
            delay: 300,
            delay_extra: 30,
            max_mbps: 100,
            try_cnt: 5,
            block_size: 256 << 10,
        }
    }
}

impl Download {
    /// Whether whole layers are downloaded.
    pub fn enabled(&self) -> bool {
        self.enable
    }

    /// Delay from the start of a disk to its download.
    pub fn delay(&self) -> Duration {
        Duration::from_secs(self.delay)
    }

    /// Upper bound of a random time that is added to the delay.
    pub fn delay_extra(&self) -> Duration {
        Duration::from_secs(self.delay_extra)
    }

    /// Limit in bytes per second; `None` for no limit.
    pub fn rate(&self) -> Option<u64> {
        (self.max_mbps != 0).then(|| self.max_mbps.saturating_mul(1 << 20))
    }

    /// Number of attempts at a layer before a long pause.
    pub fn attempts(&self) -> u32 {
        self.try_cnt.max(1)
    }

    /// Bytes of one request, clamped to 64 KiB to 64 MiB.
    pub fn block_size(&self) -> u64 {
        self.block_size.clamp(64 << 10, 64 << 20)
    }
}
