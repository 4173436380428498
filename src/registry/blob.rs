//! The body of a blob's response: exactly the requested bytes, or an error.

use std::io::{self, Read};
use std::time::{Duration, Instant};

use ureq::BodyReader;

use super::content_range::ContentRange;
use super::error::{Error, Result};
use super::health::Health;
use super::http::{Answer, body_failure};
use super::repository::{Host, Repository};
use crate::format::digest::Digest;

/// Bytes that must arrive in each [`FLOOR_PERIOD`]; else the request times out.
const FLOOR: u64 = 16 * 1024 * 30;

/// See [`FLOOR`].
const FLOOR_PERIOD: Duration = Duration::from_secs(30);

/// A blob in a registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlobRef {
    /// Its repository.
    pub repository: Repository,
    /// Its digest.
    pub digest: Digest,
    /// Its length in bytes, if the image declares it.
    pub size: Option<u64>,
}

/// Bytes of a blob as they arrive.
///
/// Reads yield at most [`BlobBody::len`] bytes and then 0. A body that is shorter or longer
/// than its header says, or that stalls, is an [`Error`] inside the [`io::Error`].
pub struct BlobBody {
    reader: BodyReader<'static>,
    host: Host,
    left: u64,
    len: u64,
    total: Option<u64>,
    /// Whether the answer ends with the last byte asked for.
    ends: bool,
    floor: Floor,
    /// The mirror that serves it.
    peer: Option<Health>,
}

/// Requested range of a blob.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted<'a> {
    pub(super) blob: &'a BlobRef,
    offset: u64,
    len: u64,
}

struct Floor {
    since: Instant,
    bytes: u64,
}

impl BlobBody {
    /// Bytes that the body yields: at most as many as were requested.
    #[allow(clippy::len_without_is_empty, reason = "it is never empty")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Bytes of the whole blob, by the server or by the image.
    pub fn total(&self) -> Option<u64> {
        self.total
    }

    /// The host that serves the bytes.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// The same body, whose end or failure is told to the mirror that serves it.
    pub(super) fn of_peer(self, peer: &Health) -> BlobBody {
        let peer = Some(peer.clone());
        BlobBody { peer, ..self }
    }

    fn next(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let most = usize::try_from(self.left).map_or(buffer.len(), |left| left.min(buffer.len()));
        if most == 0 {
            return Ok(0);
        }
        let read = match self.reader.read(&mut buffer[..most]) {
            Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => {
                return Err(body_failure(self.host.clone(), error));
            }
            read => read.unwrap_or(0),
        };
        if read == 0 {
            let found = self.len - self.left;
            let detail = format!("the body ends after {found} bytes; expected {}", self.len);
            return Err(self.unexpected(detail));
        }
        self.left -= read as u64;
        self.floor.add(read as u64, Instant::now(), &self.host)?;
        if self.left == 0 && self.ends {
            self.end()?;
        }
        Ok(read)
    }

    /// Reads past the last byte, which gives the connection back to be used again.
    fn end(&mut self) -> Result<()> {
        let more = self.reader.read(&mut [0]);
        match more.map_err(|error| body_failure(self.host.clone(), error))? {
            0 => Ok(()),
            _ => Err(self.unexpected("the body is longer than its Content-Range".to_owned())),
        }
    }

    fn unexpected(&self, detail: String) -> Error {
        Error::Unexpected {
            host: self.host.clone(),
            what: "a blob".to_owned(),
            detail,
        }
    }
}

impl Read for BlobBody {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let result = self.next(buffer);
        if let Some(peer) = &self.peer {
            match &result {
                Ok(_) if self.left == 0 => peer.succeeded(),
                Ok(_) => {}
                Err(error) => peer.broke_off(error.clone()),
            }
        }
        result.map_err(io::Error::from)
    }
}

impl Floor {
    fn add(&mut self, bytes: u64, now: Instant, host: &Host) -> Result<()> {
        self.bytes += bytes;
        if now.duration_since(self.since) < FLOOR_PERIOD {
            return Ok(());
        }
        if self.bytes < FLOOR {
            return Err(Error::Timeout {
                host: host.clone(),
                phase: format!("{} bytes in {} s", self.bytes, FLOOR_PERIOD.as_secs()),
            });
        }
        self.since = now;
        self.bytes = 0;
        Ok(())
    }
}

impl<'a> Wanted<'a> {
    /// # Errors
    /// [`Error::Mismatch`]: no byte is asked for, or one beyond the blob.
    pub(super) fn new(blob: &'a BlobRef, offset: u64, len: u64) -> Result<Wanted<'a>> {
        let end = offset.checked_add(len).filter(|_| len != 0);
        let most = blob.size.unwrap_or(u64::MAX);
        if end.is_none_or(|end| end > most) {
            return Err(Error::Mismatch {
                host: blob.repository.host().clone(),
                what: format!("requested range of blob {}", blob.digest),
                expected: format!("1 to {most} bytes"),
                found: format!("{len} bytes from byte {offset}"),
            });
        }
        Ok(Wanted { blob, offset, len })
    }

    pub(super) fn whole(blob: &'a BlobRef) -> Wanted<'a> {
        let len = blob.size.unwrap_or(u64::MAX);
        Wanted {
            blob,
            offset: 0,
            len,
        }
    }

    /// Value of the `Range` header.
    pub(super) fn range(&self) -> String {
        format!("bytes={}-{}", self.offset, self.offset + self.len - 1)
    }

    /// The body of a 200, 206 or 416 answer, if it holds what is wanted.
    ///
    /// # Errors
    /// [`Error::Mismatch`]: the blob has another size. [`Error::WithoutRanges`]: a 200 where the
    /// blob's start is not wanted. [`Error::Unexpected`]: anything else.
    pub(super) fn body(&self, answer: Answer) -> Result<BlobBody> {
        if let Some(coding) = answer.header("content-encoding")
            && !coding.eq_ignore_ascii_case("identity")
        {
            let detail = format!("Content-Encoding {coding:?} was not requested");
            return Err(self.unexpected(&answer, detail));
        }
        match answer.status() {
            206 => self.part(answer),
            200 => self.all(answer),
            416 => Err(self.beyond_end(&answer)),
            status => Err(Error::Status {
                host: answer.host().clone(),
                what: format!("blob {}", self.blob.digest),
                status,
                detail: String::new(),
            }),
        }
    }

    fn part(&self, answer: Answer) -> Result<BlobBody> {
        let header = answer.header("content-range").unwrap_or_default();
        let Some(ContentRange::Part { first, last, total }) = ContentRange::parse(header) else {
            let detail = format!("status 206 with Content-Range {header:.80?}");
            return Err(self.unexpected(&answer, detail));
        };
        let wanted_last = self.offset + self.len - 1;
        if first != self.offset || last > wanted_last {
            let detail = format!(
                "bytes {first}-{last} instead of {}-{wanted_last}",
                self.offset
            );
            return Err(self.unexpected(&answer, detail));
        }
        let len = last - first + 1;
        if let Some(found) = answer.content_length().filter(|found| *found != len) {
            let detail = format!("Content-Length {found} for bytes {first}-{last}");
            return Err(self.unexpected(&answer, detail));
        }
        self.check_total(answer.host(), total)?;
        Ok(self.stream(answer, len, total, true))
    }

    fn all(&self, answer: Answer) -> Result<BlobBody> {
        let total = answer.content_length();
        self.check_total(answer.host(), total)?;
        if self.offset != 0 {
            return Err(Error::WithoutRanges {
                host: answer.host().clone(),
                digest: self.blob.digest,
            });
        }
        let len = total.map_or(self.len, |total| total.min(self.len));
        let ends = total.or(self.blob.size).is_some_and(|total| total == len);
        if len == 0 {
            return Err(self.unexpected(&answer, "an empty blob".to_owned()));
        }
        Ok(self.stream(answer, len, total, ends))
    }

    fn stream(&self, answer: Answer, len: u64, total: Option<u64>, ends: bool) -> BlobBody {
        let (host, reader) = answer.into_reader();
        BlobBody {
            reader,
            host,
            left: len,
            len,
            total: total.or(self.blob.size),
            ends,
            floor: Floor {
                since: Instant::now(),
                bytes: 0,
            },
            peer: None,
        }
    }

    fn beyond_end(&self, answer: &Answer) -> Error {
        let header = answer.header("content-range").unwrap_or_default();
        let found = match ContentRange::parse(header) {
            Some(ContentRange::Unsatisfied { total }) => format!("{total} bytes"),
            _ => "fewer".to_owned(),
        };
        Error::Mismatch {
            host: answer.host().clone(),
            what: format!("the size of blob {}", self.blob.digest),
            expected: format!("more than {} bytes", self.offset),
            found,
        }
    }

    fn check_total(&self, host: &Host, total: Option<u64>) -> Result<()> {
        match (self.blob.size, total) {
            (Some(expected), Some(found)) if expected != found => Err(Error::Mismatch {
                host: host.clone(),
                what: format!("the size of blob {}", self.blob.digest),
                expected: format!("{expected} bytes"),
                found: format!("{found} bytes"),
            }),
            _ => Ok(()),
        }
    }

    fn unexpected(&self, answer: &Answer, detail: String) -> Error {
        Error::Unexpected {
            host: answer.host().clone(),
            what: format!("blob {}", self.blob.digest),
            detail,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trickle_is_a_timeout() {
        let host: Host = "r.example".parse().unwrap();
        let start = Instant::now();
        let mut floor = Floor {
            since: start,
            bytes: 0,
        };
        let second = Duration::from_secs(1);
        for number in 1..30 {
            floor.add(1, start + number * second, &host).unwrap();
        }
        floor.add(FLOOR, start + 30 * second, &host).unwrap();
        for number in 31..60 {
            floor.add(1, start + number * second, &host).unwrap();
        }
        let slow = floor.add(1, start + 60 * second, &host);
        assert!(matches!(slow, Err(Error::Timeout { .. })), "{slow:?}");
    }
}
