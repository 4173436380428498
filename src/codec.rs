//! Encodes and decodes LZ4 and zstd blocks. Decodes into guest memory.
//!
//! A [`Decoder`] writes through raw pointers, never through a `&mut [u8]`: the target may be guest memory,
//! which the guest may change at any time. Both decoders read back their output: matches copy earlier
//! output, and zstd may keep literals of a block there. They only copy these bytes, and never use them as
//! a length or a position. A guest that changes its buffer during a read therefore damages only its own
//! data. Lengths and positions come from the stored bytes, which must be private memory.
#![allow(unsafe_code)] // The C interfaces of the codecs take raw pointers.

use std::ffi::c_int;

use thiserror::Error;
use vm_memory::VolatileSlice;
use zstd_safe::{CCtx, DCtx, WriteBuf};

use crate::format::zfile::Algorithm;

/// Level of zstd compression, the same as in upstream's tools.
const ZSTD_LEVEL: i32 = 3;

/// Why a block could not be decoded or encoded.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Error {
    /// The stored bytes are not a valid LZ4 block of at most the expected length.
    #[error("not a valid LZ4 block of {expected} bytes")]
    Lz4 {
        /// Bytes expected.
        expected: usize,
    },
    /// The zstd library failed, usually because the stored bytes are damaged.
    #[error("the zstd codec failed: {0}")]
    Zstd(&'static str),
    /// The block is valid, but decodes to fewer bytes than expected.
    #[error("block decodes to {found} bytes; expected {expected}")]
    Length {
        /// Bytes expected.
        expected: usize,
        /// Bytes found.
        found: usize,
    },
    /// The block is too large for the interface of the codec.
    #[error("a block of {0} bytes is too large")]
    TooLarge(usize),
    /// The codec cannot allocate its working memory.
    #[error("out of memory for the {0} codec")]
    Memory(Algorithm),
}

/// Decodes blocks, and reuses the working memory of the codecs.
#[derive(Default)]
pub struct Decoder {
    /// Created for the first zstd block; takes about 100 KiB.
    zstd: Option<DCtx<'static>>,
}

impl Decoder {
    /// Decodes the block `stored` into `into`, which the block must fill exactly. After an error, `into`
    /// may be partly written.
    ///
    /// # Errors
    /// [`Error::Lz4`] or [`Error::Zstd`] for a damaged or too long block, [`Error::Length`] for a shorter
    /// one, [`Error::Memory`] without working memory.
    pub fn decode(
        &mut self,
        algorithm: Algorithm,
        stored: &[u8],
        into: &VolatileSlice,
    ) -> Result<(), Error> {
        let expected = into.len();
        let found = match algorithm {
            Algorithm::Lz4 => decode_lz4(stored, into)?,
            Algorithm::Zstd => self.decode_zstd(stored, into)?,
        };
        if found == expected {
            Ok(())
        } else {
            Err(Error::Length { expected, found })
        }
    }

    fn decode_zstd(&mut self, stored: &[u8], into: &VolatileSlice) -> Result<usize, Error> {
        let context = match &mut self.zstd {
            Some(context) => context,
            none => {
                let context = DCtx::try_create().ok_or(Error::Memory(Algorithm::Zstd))?;
                none.insert(context)
            }
        };
        let guard = into.ptr_guard_mut();
        let mut region = Region {
            start: guard.as_ptr(),
            len: into.len(),
        };
        let result = context.decompress(&mut region, stored);
        result.map_err(|code| Error::Zstd(zstd_safe::get_error_name(code)))
    }
}

fn decode_lz4(stored: &[u8], into: &VolatileSlice) -> Result<usize, Error> {
    let expected = into.len();
    let guard = into.ptr_guard_mut();
    // SAFETY: the source is a valid slice of the given length, and the guard keeps `into` mapped and
    // writable for its length. LZ4_decompress_safe stays within these bounds for any stored bytes and any
    // concurrent change of the target (see the module).
    let found = unsafe {
        lz4_sys::LZ4_decompress_safe(
            stored.as_ptr().cast(),
            guard.as_ptr().cast(),
            c_len(stored.len())?,
            c_len(expected)?,
        )
    };
    usize::try_from(found).map_err(|_| Error::Lz4 { expected })
}

/// Target of a zstd decompression, as a raw pointer.
struct Region {
    start: *mut u8,
    len: usize,
}

// SAFETY: `start` is valid for writes of `len` bytes: `decode_zstd` holds the guard of the slice longer
// than the region. `as_slice` exposes no bytes.
unsafe impl WriteBuf for Region {
    fn as_slice(&self) -> &[u8] {
        &[]
    }

    fn capacity(&self) -> usize {
        self.len
    }

    fn as_mut_ptr(&mut self) -> *mut u8 {
        self.start
    }

    // SAFETY: has no precondition: the number of filled bytes is not kept.
    unsafe fn filled_until(&mut self, _n: usize) {}
}

/// Encodes blocks, and reuses the working memory of the codecs.
#[derive(Default)]
pub struct Encoder {
    zstd: Option<CCtx<'static>>,
}

impl Encoder {
    /// Creates an encoder for both algorithms.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends `plain`, encoded as one block, to `stored`.
    ///
    /// # Errors
    /// [`Error::TooLarge`] for a block beyond the codec's limit, [`Error::Memory`] without working memory.
    pub fn encode(
        &mut self,
        algorithm: Algorithm,
        plain: &[u8],
        stored: &mut Vec<u8>,
    ) -> Result<(), Error> {
        match algorithm {
            Algorithm::Lz4 => encode_lz4(plain, stored),
            Algorithm::Zstd => self.encode_zstd(plain, stored),
        }
    }

    fn encode_zstd(&mut self, plain: &[u8], stored: &mut Vec<u8>) -> Result<(), Error> {
        let context = match &mut self.zstd {
            Some(context) => context,
            none => {
                let context = CCtx::try_create().ok_or(Error::Memory(Algorithm::Zstd))?;
                none.insert(context)
            }
        };
        let start = stored.len();
        stored.resize(start + zstd_safe::compress_bound(plain.len()), 0);
        let len = context
            .compress(&mut stored[start..], plain, ZSTD_LEVEL)
            .map_err(|code| Error::Zstd(zstd_safe::get_error_name(code)))?;
        stored.truncate(start + len);
        Ok(())
    }
}

fn encode_lz4(plain: &[u8], stored: &mut Vec<u8>) -> Result<(), Error> {
    let start = stored.len();
    // LZ4's bound for incompressible bytes, with which it never runs out of space.
    let bound = plain.len() + plain.len() / 255 + 16;
    let (plain_len, bound_len) = (c_len(plain.len())?, c_len(bound)?);
    stored.reserve(bound);
    let target = stored.spare_capacity_mut();
    // SAFETY: both pointers are valid for the lengths given, `target` for writes.
    let len = unsafe {
        lz4_sys::LZ4_compress_default(
            plain.as_ptr().cast(),
            target.as_mut_ptr().cast(),
            plain_len,
            bound_len,
        )
    };
    let len = usize::try_from(len).unwrap_or_default().min(bound);
    if len == 0 {
        return Err(Error::TooLarge(plain.len()));
    }
    // SAFETY: `bound` more bytes are reserved, and LZ4 has written the first `len` of them.
    unsafe { stored.set_len(start + len) };
    Ok(())
}

fn c_len(len: usize) -> Result<c_int, Error> {
    c_int::try_from(len).map_err(|_| Error::TooLarge(len))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOTH: [Algorithm; 2] = [Algorithm::Lz4, Algorithm::Zstd];

    /// Bytes that compress by about half, the same each time.
    fn sample(len: usize) -> Vec<u8> {
        let mut state = 1u32;
        let bytes = (0..len).map(|at| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            if at % 64 < 32 { 7 } else { (state >> 24) as u8 }
        });
        bytes.collect()
    }

    fn encode(algorithm: Algorithm, plain: &[u8]) -> Vec<u8> {
        let mut stored = b"before".to_vec();
        let mut encoder = Encoder::new();
        encoder.encode(algorithm, plain, &mut stored).unwrap();
        encoder
            .encode(algorithm, b"another", &mut Vec::new())
            .unwrap();
        stored.split_off(6)
    }

    /// Decodes into the middle of a larger buffer, whose ends must stay as they were.
    fn decode(algorithm: Algorithm, stored: &[u8], len: usize) -> Result<Vec<u8>, Error> {
        let mut buffer = vec![0xEE; len + 128];
        let into = VolatileSlice::from(&mut buffer[64..64 + len]);
        let result = Decoder::default().decode(algorithm, stored, &into);
        assert!(buffer[..64].iter().all(|byte| *byte == 0xEE));
        assert!(buffer[64 + len..].iter().all(|byte| *byte == 0xEE));
        result.map(|()| buffer[64..64 + len].to_vec())
    }

    #[test]
    fn round_trip() {
        for algorithm in BOTH {
            for len in [1, 512, 4096, 65_535, 65_536] {
                let plain = sample(len);
                let stored = encode(algorithm, &plain);
                assert!(stored.len() <= len * 2 + 64);
                assert_eq!(
                    decode(algorithm, &stored, len),
                    Ok(plain),
                    "{algorithm} {len}"
                );
            }
        }
    }

    #[test]
    fn lz4_blocks_are_plain_lz4() {
        let plain = sample(4096);
        let stored = encode(Algorithm::Lz4, &plain);
        assert_eq!(lz4_flex::block::decompress(&stored, 4096).unwrap(), plain);
        let theirs = lz4_flex::block::compress(&plain);
        assert_eq!(decode(Algorithm::Lz4, &theirs, 4096), Ok(plain));
    }

    #[test]
    fn length_must_be_exact() {
        for algorithm in BOTH {
            let stored = encode(algorithm, &sample(4096));
            let (expected, found) = (4097, 4096);
            let error = decode(algorithm, &stored, 4097);
            assert_eq!(error, Err(Error::Length { expected, found }));
            assert!(decode(algorithm, &stored, 4095).is_err());
            assert!(decode(algorithm, &[], 4096).is_err());
        }
    }

    #[test]
    fn damage_never_leaves_the_target() {
        for algorithm in BOTH {
            let plain = sample(4096);
            let stored = encode(algorithm, &plain);
            for at in 0..stored.len() {
                let mut damaged = stored.clone();
                damaged[at] ^= 0x55;
                let _ = decode(algorithm, &damaged, 4096);
                assert!(decode(algorithm, &stored[..at], 4096).is_err());
            }
        }
    }
}
