//! Checks of the values of a specification, other than its paths.

use std::os::unix::ffi::OsStrExt;

use super::{DiskSpec, MAX_LABEL_LEN, MAX_LABELS};
use crate::daemon::config::MAX_QUEUES;
use crate::image::MAX_LAYERS;
use crate::node::error::{Code, Failure};
use crate::virtio::queue::MAX_QUEUE_SIZE;
use crate::virtio::request::SERIAL_LEN;

/// Largest number of bytes that a field can name: more than there is of memory or storage.
const MAX_BYTES: u64 = 64 << 40;

/// Longest busy-polling, in microseconds.
const MAX_POLL_US: u32 = 1_000_000;

impl DiskSpec {
    /// Checks the values that do not depend on files.
    ///
    /// # Errors
    /// [`Code::BadRequest`] names the field.
    pub(super) fn check_values(&self) -> Result<(), Failure> {
        let wrong = [
            self.wrong_layers(),
            self.wrong_sizes(),
            self.wrong_queues(),
            self.wrong_serial(),
            self.wrong_socket(),
            self.wrong_labels(),
        ];
        match wrong.into_iter().flatten().next() {
            Some(text) => Err(Failure::new(Code::BadRequest, text)),
            None => Ok(()),
        }
    }

    fn wrong_layers(&self) -> Option<String> {
        let count = self.layers.as_ref()?.len();
        let text = format!("layers has {count} entries; expected 1 to {MAX_LAYERS}");
        (!(1..=MAX_LAYERS).contains(&count)).then_some(text)
    }

    fn wrong_sizes(&self) -> Option<String> {
        if self.upper_limit.is_some() && self.upper.is_none() {
            return Some(
                "upper_limit without upper; name the writable layer's directory".to_owned(),
            );
        }
        let sizes = [
            ("upper_limit", self.upper_limit),
            ("block_cache", self.block_cache),
        ];
        let large = sizes
            .into_iter()
            .find(|(_, size)| size.is_some_and(|size| size > MAX_BYTES));
        large.map(|(name, _)| format!("{name}: expected at most {MAX_BYTES} bytes"))
    }

    fn wrong_queues(&self) -> Option<String> {
        let number = |number| !(1..=MAX_QUEUES).contains(&number);
        let size = |size: u16| !size.is_power_of_two() || !(2..=MAX_QUEUE_SIZE).contains(&size);
        if self.num_queues.is_some_and(number) {
            return Some(format!("num_queues: expected 1 to {MAX_QUEUES}"));
        }
        if self.queue_size.is_some_and(size) {
            return Some(format!(
                "queue_size: expected a power of two from 2 to {MAX_QUEUE_SIZE}"
            ));
        }
        let long = self.poll_us.is_some_and(|time| time > MAX_POLL_US);
        long.then(|| format!("poll_us: expected at most {MAX_POLL_US}"))
    }

    fn wrong_serial(&self) -> Option<String> {
        let serial = self.serial.as_ref()?;
        let printable = |byte: u8| byte.is_ascii_graphic() || byte == b' ';
        let valid = (1..=SERIAL_LEN).contains(&serial.len()) && serial.bytes().all(printable);
        (!valid).then(|| format!("serial: expected 1 to {SERIAL_LEN} printable ASCII characters"))
    }

    fn wrong_socket(&self) -> Option<String> {
        let path = self.socket.as_ref()?;
        let named = path.file_name().is_some() && !path.as_os_str().as_bytes().contains(&0);
        (!path.is_absolute() || !named)
            .then(|| "socket: expected an absolute path of a file".to_owned())
    }

    fn wrong_labels(&self) -> Option<String> {
        let long = |text: &String| text.len() > MAX_LABEL_LEN;
        let mut labels = self.labels.iter();
        let wrong = self.labels.len() > MAX_LABELS
            || labels.any(|(key, value)| key.is_empty() || long(key) || long(value));
        wrong.then(|| {
            format!(
                "labels: expected at most {MAX_LABELS}, with keys of 1 to {MAX_LABEL_LEN} bytes and values of at most \
                 {MAX_LABEL_LEN}"
            )
        })
    }
}
