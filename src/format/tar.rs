//! Tar wrapper of a layer: an archive whose first member is the layer.
//!
//! Two forms are parsed: a `ustar` header followed by the payload, and a pax header with one block of
//! records before that. The second form is written, as by upstream's tools.

use thiserror::Error;

/// Bytes of a tar block.
pub const BLOCK: usize = 512;

/// Bytes before the payload in the pax form; [`payload`] needs no more of a file.
pub const PREFIX: usize = 3 * BLOCK;

/// Name of the member that holds the layer.
const MEMBER_NAME: &str = "overlaybd.commit";

/// Location of the wrapped bytes in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Payload {
    /// Byte of the file at which the payload starts.
    pub offset: u64,
    /// Length of the payload in bytes.
    pub len: u64,
}

/// Why a tar file is not usable as a wrapper.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Error {
    /// The file ends inside the headers.
    #[error("tar headers need {PREFIX} bytes, the file has {0}")]
    Short(usize),
    /// The header after the pax records is damaged or has an unknown format.
    #[error("the tar header at byte 1024, after the pax records, is not a valid ustar header")]
    SecondHeader,
    /// More pax records than the one block that is supported.
    #[error("pax records of {0} bytes; expected 1 to 512")]
    PaxLength(u64),
    /// A pax record that does not follow `length key=value`.
    #[error("malformed pax record at byte {0}")]
    PaxRecord(usize),
    /// The size field is not an octal number.
    #[error("tar size field at byte {0} is not an octal number")]
    Size(usize),
}

/// Finds the payload by the first [`PREFIX`] bytes of a file, or all bytes of a shorter file. Returns `None`
/// if the file is not a tar file.
///
/// # Errors
/// Any [`Error`], if the first header is a valid tar header and what follows is not.
pub fn payload(head: &[u8]) -> Result<Option<Payload>, Error> {
    let Some(first) = head.get(..BLOCK).filter(|header| is_ustar(header)) else {
        return Ok(None);
    };
    let len = octal(field(first, SIZE), 0)?;
    if first.get(TYPE_FLAG) != Some(&b'x') {
        let offset = BLOCK as u64;
        return Ok(Some(Payload { offset, len }));
    }
    let second = head
        .get(2 * BLOCK..PREFIX)
        .ok_or(Error::Short(head.len()))?;
    if !is_ustar(second) {
        return Err(Error::SecondHeader);
    }
    let records = usize::try_from(len)
        .ok()
        .filter(|len| (1..=BLOCK).contains(len))
        .ok_or(Error::PaxLength(len))?;
    let records = field(head, BLOCK..BLOCK.saturating_add(records));
    let len = match pax_size(records)? {
        Some(len) if len > 0 => len,
        _ => octal(field(second, SIZE), 2 * BLOCK)?,
    };
    let offset = PREFIX as u64;
    Ok(Some(Payload { offset, len }))
}

/// Returns the headers that precede a payload of `len` bytes.
pub fn prefix(len: u64) -> [u8; PREFIX] {
    let record = pax_record(len);
    let mut records = [0; BLOCK];
    put(&mut records, 0, &record);

    let mut pax = [0; BLOCK];
    put(&mut pax, 0, "overlaybd.pax");
    put(&mut pax, SIZE.start, &format!("{:>11o} ", record.len()));
    put(&mut pax, TYPE_FLAG, "x");
    seal(&mut pax);

    let member = member(MEMBER_NAME, "100644 ", "          0 ");
    let mut out = [0; PREFIX];
    let (blocks, _) = out.as_chunks_mut::<BLOCK>();
    for (to, from) in blocks.iter_mut().zip([pax, records, member]) {
        *to = from;
    }
    out
}

/// Returns an archive with one member, a read-only file of `root`.
pub fn archive(name: &str, content: &[u8]) -> Vec<u8> {
    let len = content.len() as u64;
    let mut archive = member(name, "100444 ", &format!("{len:>11o} ")).to_vec();
    archive.extend_from_slice(content);
    let padding = usize::try_from(trailing(len)).unwrap_or_default();
    archive.resize(archive.len().saturating_add(padding), 0);
    archive
}

/// The header of a regular file.
fn member(name: &str, mode: &str, size: &str) -> [u8; BLOCK] {
    let mut member = [0; BLOCK];
    put(&mut member, 0, name);
    put(&mut member, 100, mode);
    put(&mut member, 108, "     0 ");
    put(&mut member, 116, "     0 ");
    put(&mut member, SIZE.start, size);
    put(&mut member, 136, "          0 ");
    put(&mut member, TYPE_FLAG, "0");
    put(&mut member, 265, "root");
    put(&mut member, 297, "root");
    seal(&mut member);
    member
}

/// Number of zero bytes after a payload of `len` bytes: up to the next block, and two blocks.
pub fn trailing(len: u64) -> u64 {
    const BLOCK_LEN: u64 = BLOCK as u64;
    (len.wrapping_neg() % BLOCK_LEN).saturating_add(2 * BLOCK_LEN)
}

const SIZE: std::ops::Range<usize> = 124..136;
const CHECKSUM: std::ops::Range<usize> = 148..156;
const TYPE_FLAG: usize = 156;
const MAGIC: usize = 257;

/// Whether a block is a POSIX tar header: compares magic, version and either form of the checksum.
fn is_ustar(header: &[u8]) -> bool {
    // The format of GNU tar has blanks in place of the version, and counts as a file without wrapper.
    if field(header, 257..262) != b"ustar" || field(header, 263..265) != b"00" {
        return false;
    }
    let (unsigned, signed) = checksums(header);
    octal(field(header, CHECKSUM), 0)
        .is_ok_and(|stored| stored == unsigned || i64::try_from(stored) == Ok(signed))
}

/// Sums of the bytes of a header as unsigned and as signed numbers, with blanks in the checksum field. Some
/// old writers used signed numbers.
fn checksums(header: &[u8]) -> (u64, i64) {
    let mut sums = (0, 0);
    for (at, byte) in header.iter().enumerate() {
        let byte = if CHECKSUM.contains(&at) { b' ' } else { *byte };
        let (unsigned, signed) = sums;
        sums = (
            u64::saturating_add(unsigned, u64::from(byte)),
            i64::saturating_add(signed, i64::from(byte.cast_signed())),
        );
    }
    sums
}

/// A field of a header; empty if the header ends before it does.
fn field(header: &[u8], bytes: std::ops::Range<usize>) -> &[u8] {
    header.get(bytes).unwrap_or_default()
}

/// Parses an octal field: blanks, digits, then blanks or NULs. An empty field is 0.
fn octal(field: &[u8], header: usize) -> Result<u64, Error> {
    let digits = field
        .split(|byte| matches!(byte, 0 | b' '))
        .find(|part| !part.is_empty());
    let mut digits = digits.unwrap_or_default().iter();
    let value = digits.try_fold(0u64, |value, digit| {
        let digit = char::from(*digit).to_digit(8)?;
        value.checked_mul(8)?.checked_add(digit.into())
    });
    value.ok_or(Error::Size(header.saturating_add(SIZE.start)))
}

/// Returns the value of the `size` record, if there is one.
fn pax_size(records: &[u8]) -> Result<Option<u64>, Error> {
    let (mut rest, mut at) = (records, BLOCK);
    let mut size = None;
    while rest.first().is_some_and(|byte| *byte != 0) {
        let bad = Error::PaxRecord(at);
        let Some((len, record)) = split_record(rest) else {
            return Err(bad);
        };
        if let Some(value) = record.strip_prefix("size=") {
            size = Some(value.parse().map_err(|_| bad)?);
        }
        // A record has at least one byte, and lies in `rest`.
        rest = rest.get(len..).unwrap_or_default();
        at = at.saturating_add(len);
    }
    Ok(size)
}

/// Splits the first record, `"<length> key=value\n"`, off `bytes`: returns its length and `key=value`.
fn split_record(bytes: &[u8]) -> Option<(usize, &str)> {
    let blank = bytes.iter().position(|byte| *byte == b' ')?;
    let len = std::str::from_utf8(bytes.get(..blank)?).ok()?;
    let len = len.parse().ok()?;
    let record = bytes.get(blank.checked_add(1)?..len)?.strip_suffix(b"\n")?;
    Some((len, std::str::from_utf8(record).ok()?))
}

/// Returns the record `"<length of the record> size=<len>\n"`.
fn pax_record(len: u64) -> String {
    let body = format!(" size={len}\n");
    let is_total = |total: &usize| *total == body.len().saturating_add(total.to_string().len());
    let total = (body.len()..).find(is_total).unwrap_or_default();
    format!("{total}{body}")
}

fn put(header: &mut [u8], at: usize, text: &str) {
    for (to, from) in header.iter_mut().skip(at).zip(text.bytes()) {
        *to = from;
    }
}

/// Sets magic, version and checksum.
fn seal(header: &mut [u8]) {
    put(header, MAGIC, "ustar\x0000");
    let (sum, _) = checksums(header);
    put(header, CHECKSUM.start, &format!("{sum:>6o} "));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_found() {
        for len in [1, 511, 512, 9_999, 10_000, 1 << 40, u64::MAX] {
            let head = prefix(len);
            let offset = 1536;
            assert_eq!(payload(&head), Ok(Some(Payload { offset, len })));
        }
        assert_eq!(trailing(512), 1024);
        assert_eq!(trailing(513), 511 + 1024);
        assert_eq!(trailing(1023), 1 + 1024);
    }

    #[test]
    fn the_member_of_an_archive_is_found() {
        for len in [0, 1, 512, 1000] {
            let content = vec![7; len];
            let archive = archive("trace", &content);
            let found = payload(&archive).unwrap().unwrap();
            assert_eq!((found.offset, found.len), (512, len as u64));
            assert_eq!(archive[512..][..len], content);
            assert_eq!(archive.len() % 512, 0);
        }
    }

    #[test]
    fn record_counts_its_own_length() {
        assert_eq!(pax_record(1_586_834), "16 size=1586834\n");
        assert_eq!(pax_record(5), "9 size=5\n");
        assert_eq!(pax_record(50), "11 size=50\n", "two digits need one more");
    }

    #[test]
    fn plain_header_and_signed_checksum() {
        let mut header = prefix(7)[2 * BLOCK..].to_vec();
        put(&mut header, SIZE.start, "00000001750\0");
        header[300] = 0xFF;
        seal(&mut header);
        let (offset, len) = (512, 1000);
        assert_eq!(payload(&header), Ok(Some(Payload { offset, len })));
        let signed = checksums(&header).1;
        put(&mut header, CHECKSUM.start, &format!("{signed:>6o} "));
        assert_eq!(payload(&header), Ok(Some(Payload { offset, len })));
    }

    #[test]
    fn other_files_are_no_tar() {
        assert_eq!(payload(&[]), Ok(None));
        assert_eq!(payload(&[0; PREFIX]), Ok(None));
        let mut head = prefix(10);
        head[0] ^= 1;
        assert_eq!(payload(&head), Ok(None), "checksum does not match");
        let mut gnu = prefix(10)[2 * BLOCK..].to_vec();
        put(&mut gnu, MAGIC, "ustar  \0");
        assert_eq!(payload(&gnu), Ok(None), "GNU's own format");
        let unfinished = prefix(10).map(|byte| if byte == b'u' { b'x' } else { byte });
        assert_eq!(payload(&unfinished), Ok(None));
    }

    #[test]
    fn broken_pax_forms_are_named() {
        assert_eq!(payload(&prefix(10)[..1535]), Err(Error::Short(1535)));
        let mut head = prefix(10);
        head[2 * BLOCK] ^= 1;
        assert_eq!(payload(&head), Err(Error::SecondHeader));
        for (records, error) in [
            ("99 size=1\n", Error::PaxRecord(512)),
            ("10 size=x\n", Error::PaxRecord(512)),
            ("10 size1=\n10 size\n", Error::PaxRecord(522)),
        ] {
            let mut head = prefix(10);
            put(&mut head, BLOCK, records);
            put(&mut head, SIZE.start, &format!("{:>11o} ", records.len()));
            seal(&mut head[..BLOCK]);
            assert_eq!(payload(&head), Err(error), "{records:?}");
        }
        let mut head = prefix(10);
        put(&mut head, SIZE.start, "       1001 ");
        seal(&mut head[..BLOCK]);
        assert_eq!(payload(&head), Err(Error::PaxLength(513)));
        put(&mut head, SIZE.start, "77777777777777"); // also no number in the checksum field
        assert_eq!(payload(&head), Ok(None));
    }

    #[test]
    fn without_a_pax_size_the_header_counts() {
        let mut head = prefix(10);
        put(&mut head, BLOCK, "11 mtime=1\n");
        put(&mut head, 2 * BLOCK + SIZE.start, "00000000777\0");
        seal(&mut head[2 * BLOCK..]);
        let (offset, len) = (1536, 0o777);
        assert_eq!(payload(&head), Ok(Some(Payload { offset, len })));
    }
}
