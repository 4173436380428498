//! The descriptors of a blob that the fetcher opened.

use std::os::fd::OwnedFd;

use super::waker::{FetchError, FetchErrorKind};

/// Descriptors of a blob that the fetcher opened.
#[derive(Debug)]
pub struct Opened {
    /// Bytes of the blob.
    pub len: u64,
    /// Its data file.
    pub data: OwnedFd,
    /// Its presence map; `None` if all of it is there.
    pub map: Option<OwnedFd>,
}

impl Opened {
    /// The descriptors that came with the fetcher's answer, if they are those that it announced.
    pub(super) fn new(len: u64, complete: bool, files: Vec<OwnedFd>) -> Result<Self, FetchError> {
        let mut files = files.into_iter();
        let opened = match (files.next(), files.next(), complete) {
            (Some(data), None, true) => Some((data, None)),
            (Some(data), Some(map), false) => Some((data, Some(map))),
            _ => None,
        };
        let (data, map) = opened.ok_or_else(|| {
            let reason = "the fetcher sent a wrong number of descriptors for the blob";
            FetchError::new(FetchErrorKind::System, reason)
        })?;
        Ok(Self { len, data, map })
    }
}
