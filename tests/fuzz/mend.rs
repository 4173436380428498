//! Gives the checksums of a mutated layer the values that fit what they cover, so that a fuzzer
//! gets past them, and changes what lies inside compressed blocks.

#![allow(dead_code)] // each target uses its part

use libfuzzer_sys::fuzzer_mutate;
use ovbd_vhost::format::zfile::Algorithm;
use ovbd_vhost::format::{crc, tar};
use ovbd_vhost::image::layer::Layer;
use ovbd_vhost::image::reader::Reader;
use ovbd_vhost::source::Blob;

use crate::file::Held;
use common::layers::{Pack, wrap_tar, zfile};

const ZFILE_MAGIC: &[u8] = b"ZFile\0\x01\0tuji.yyf@Alibaba";
/// Bytes of a ZFile's header, and of its trailer.
const ZFILE_HEADER: usize = 512;
/// Bytes of an LSMT header that mean something; the rest of its 4096 are zeros.
const LSMT_FIELDS: usize = 96;

/// Makes every checksum right.
pub fn layer(bytes: &mut [u8]) {
    tar(bytes);
    let head = &bytes[..bytes.len().min(tar::PREFIX)];
    let (start, len) = match tar::payload(head) {
        Ok(Some(payload)) => (payload.offset as usize, payload.len as usize),
        _ => (0, bytes.len()),
    };
    let end = start.saturating_add(len).min(bytes.len());
    if let Some(payload) = bytes.get_mut(start..end)
        && payload.len() >= 2 * ZFILE_HEADER
        && payload.starts_with(ZFILE_MAGIC)
    {
        zfile_sums(payload);
    }
}

/// Makes the checksums of tar headers right.
pub fn tar(bytes: &mut [u8]) {
    for at in [0, 2 * tar::BLOCK] {
        let Some(header) = bytes.get_mut(at..at + tar::BLOCK) else {
            return;
        };
        if !header[257..].starts_with(b"ustar") {
            return;
        }
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        if header[156] != b'x' {
            return;
        }
    }
}

fn number(bytes: &[u8], at: usize) -> usize {
    u64::from_le_bytes(std::array::from_fn(|index| bytes[at + index])) as usize
}

fn put(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// Makes the checksums of blocks, table, trailer and header right, as far as they can be found.
fn zfile_sums(bytes: &mut [u8]) {
    let trailer = bytes.len() - ZFILE_HEADER;
    let fields = &bytes[trailer..];
    let (table, blocks) = (number(fields, 40), number(fields, 48));
    let dictionary = (number(fields, 84) & 0xffff_ffff, fields[88] != 0);
    let table = table.min(trailer);
    let entries = blocks.min((trailer - table) / 4);
    let mut at = ZFILE_HEADER + dictionary.0;
    for entry in (0..entries).map(|entry| table + 4 * entry) {
        let len = number(bytes, entry) & 0xffff_ffff;
        if !dictionary.1 || len < 4 || at + len > table {
            break;
        }
        let sum = crc::raw(crc::BLOCK_SEED, &bytes[at..at + len - 4]);
        put(bytes, at + len - 4, sum);
        at += len;
    }
    let sum = crc::raw(0, &bytes[table..table + 4 * entries]);
    for start in [0, trailer] {
        put(bytes, start + 64, sum);
        put(bytes, start + 28, 0);
        let digest = crc::raw(0, &bytes[start..start + ZFILE_HEADER]);
        put(bytes, start + 28, digest);
    }
}

/// Mutates a layer: as it is, with its checksums made right, or inside its compressed blocks.
pub fn mutate(data: &mut [u8], size: usize, max_size: usize, seed: u32) -> usize {
    let inside = match seed % 4 {
        0 => return fuzzer_mutate(data, size, max_size),
        1 => repacked(&data[..size], seed),
        _ => None,
    };
    if let Some(bytes) = inside
        && bytes.len() <= max_size
    {
        data[..bytes.len()].copy_from_slice(&bytes);
        return bytes.len();
    }
    let size = fuzzer_mutate(data, size, max_size);
    layer(&mut data[..size]);
    size
}

/// The same layer with its LSMT structures mutated, packed in another way.
fn repacked(bytes: &[u8], seed: u32) -> Option<Vec<u8>> {
    let held = Held::new(bytes);
    let blob = Blob::open(held.path()).ok()?;
    let (opened, _) = Layer::load(blob.into()).ok()?;
    let len = usize::try_from(opened.container().len()).ok()?;
    if len > 1 << 20 {
        return None;
    }
    let mut plain = vec![0; len];
    let mut reader = Reader::new();
    reader.read_layer(opened.container(), 0, &mut plain).ok()?;
    // The data itself is of no interest: what is around it is.
    let index = (opened.trailer().index_offset as usize).min(len - 4096);
    let parts = [
        0..LSMT_FIELDS,
        index..len - 4096,
        len - 4096..len - 4096 + LSMT_FIELDS,
    ];
    let part = &mut plain[parts[(seed >> 2) as usize % 3].clone()];
    if part.is_empty() {
        return None;
    }
    let whole = part.len();
    let kept = fuzzer_mutate(part, whole, whole);
    part[kept..].fill(0);
    let packed = match (seed >> 4) % 4 {
        0 => plain,
        codec => zfile(
            &plain,
            Pack {
                algorithm: if codec == 1 {
                    Algorithm::Zstd
                } else {
                    Algorithm::Lz4
                },
                block_size: 4096 << ((seed >> 6) % 5),
                checksum: seed & 0x800 != 0,
                dictionary_len: if seed & 0x3000 == 0 { 40 } else { 0 },
                overwrite: seed & 0x4000 != 0,
            },
        ),
    };
    Some(if seed & 0x1_8000 == 0 {
        wrap_tar(&packed)
    } else {
        packed
    })
}
