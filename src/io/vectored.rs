//! Vectored writes from guest memory. The kernel copies the bytes, so no reference to memory that a guest
//! may change is created.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use vm_memory::VolatileSlice;

/// Most pieces of one `pwritev(2)` (IOV_MAX).
const MAX_PIECES: usize = 1024;

/// Writes `pieces`, in order, to `file` at byte `offset`.
///
/// # Errors
/// That of `pwritev(2)`; some bytes may have been written.
pub fn write_all_at(file: &File, pieces: &[VolatileSlice<'_>], mut offset: u64) -> io::Result<()> {
    let mut guards: Vec<_> = Vec::with_capacity(pieces.len().min(MAX_PIECES));
    for pieces in pieces.chunks(MAX_PIECES) {
        guards.clear();
        guards.extend(pieces.iter().map(VolatileSlice::ptr_guard));
        let mut vectors: Vec<_> = guards
            .iter()
            .map(|guard| libc::iovec {
                iov_base: guard.as_ptr().cast_mut().cast(),
                iov_len: guard.len(),
            })
            .collect();
        let mut left = &mut vectors[..];
        while !left.is_empty() {
            let at = libc::off_t::try_from(offset)
                .map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
            // SAFETY: each vector is memory that its guard keeps mapped during the call. The kernel only
            // reads it; a concurrent write changes only which bytes are copied.
            let count = unsafe {
                libc::pwritev(
                    file.as_raw_fd(),
                    left.as_ptr(),
                    left.len() as libc::c_int,
                    at,
                )
            };
            let mut count = match usize::try_from(count) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => count,
                Err(_) => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => continue,
                    error => return Err(error),
                },
            };
            offset += count as u64;
            while let Some(first) = left.first_mut() {
                if count < first.iov_len {
                    first.iov_base = first.iov_base.wrapping_byte_add(count);
                    first.iov_len -= count;
                    break;
                }
                count -= first.iov_len;
                left = &mut left[1..];
            }
        }
    }
    Ok(())
}

/// Starts the write-back of `len` bytes at `offset` without waiting for it. This is a hint: the next sync
/// makes the bytes durable and reports errors.
pub fn begin_to_store(file: &File, offset: u64, len: u64) {
    if let (Ok(offset), Ok(len)) = (libc::off_t::try_from(offset), libc::off_t::try_from(len)) {
        // SAFETY: takes numbers only, and changes no bytes.
        unsafe {
            libc::sync_file_range(file.as_raw_fd(), offset, len, libc::SYNC_FILE_RANGE_WRITE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_written_in_order_at_the_offset() {
        let file = tempfile::tempfile().unwrap();
        let (mut a, mut b) = ([1u8; 3], [2u8; 5]);
        let many = vec![VolatileSlice::from(&mut a[..]); 1500];
        write_all_at(&file, &many, 10).unwrap();
        write_all_at(&file, &[VolatileSlice::from(&mut b[..])], 10 + 4500).unwrap();
        let mut bytes = Vec::new();
        io::Read::read_to_end(&mut &file, &mut bytes).unwrap();
        assert_eq!(bytes.len(), 10 + 4500 + 5);
        assert!(bytes[..10].iter().all(|byte| *byte == 0));
        assert!(bytes[10..4510].iter().all(|byte| *byte == 1));
        assert_eq!(bytes[4510..], [2; 5]);
    }

    #[test]
    fn an_error_is_returned() {
        let file = File::open("/dev/null").unwrap();
        let mut a = [1u8; 3];
        assert!(write_all_at(&file, &[VolatileSlice::from(&mut a[..])], 0).is_err());
    }
}
