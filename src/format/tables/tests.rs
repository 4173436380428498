//! The header and the records of image tables: what is written is read, and damage is noticed.

use std::time::Duration;

use uuid::Uuid;

use super::*;
use crate::format::zfile::{Algorithm, BlockFormat, Totals};
use crate::format::{HeaderKind, tar};

fn header() -> Header {
    Header {
        key: Digest::of(b"stack"),
        counts: Counts {
            layers: 3,
            nodes: 2,
            segments: 17,
            bases: 3,
            starts: 2100,
        },
        content_checksum: 0x1234_5678,
    }
}

fn record() -> LayerRecord {
    let format = BlockFormat {
        algorithm: Algorithm::Zstd,
        block_size: 16384,
        checksum: true,
        dictionary_len: 0,
    };
    let totals = Totals {
        table_offset: 70_000,
        blocks: 7,
        original_size: 7 * 16384 - 5,
        table_crc: 99,
    };
    let trailer = zfile::trailer(&format, &totals);
    let trailer = zfile::Header::decode(&trailer, HeaderKind::Trailer).unwrap();
    LayerRecord {
        blob_len: 71_000,
        last_byte: Some((70_999, 3)),
        payload: tar::Payload {
            offset: 500,
            len: 70_500,
        },
        zfile: Some(trailer),
        trailer: lsmt::Header {
            index_offset: 4096,
            index_entries: 17,
            message: b"made upon".to_vec(),
            ..lsmt::Header::empty(1 << 30, Uuid::from_u128(5), Uuid::from_u128(4))
        },
        trailer_at: 7 * 16384 - 5 - 4096,
        mappings: 16,
        index_crc: 7,
        sampled: Some(u64::MAX),
    }
}

#[test]
fn what_is_encoded_is_decoded() {
    let header = header();
    let layout = header.counts.layout().unwrap();
    assert_eq!(layout.layers, 4096);
    let sections = [
        layout.layers,
        layout.nodes,
        layout.bases,
        layout.starts,
        layout.values,
    ];
    assert!(sections.is_sorted() && sections.iter().all(|at| at % 128 == 0));
    assert_eq!(layout.len, layout.values + 17 * 7 + 1);
    let decoded = Header::decode(&header.encode(), layout.len).unwrap();
    assert_eq!(decoded, (header, layout));
    for record in [
        record(),
        LayerRecord {
            zfile: None,
            last_byte: None,
            sampled: None,
            trailer_at: 0,
            ..record()
        },
    ] {
        assert_eq!(LayerRecord::decode(&record.encode()).unwrap(), record);
    }
}

#[test]
fn every_changed_bit_of_the_header_is_noticed() {
    let good = header().encode();
    let len = header().counts.layout().unwrap().len;
    for bit in 0..size_of::<RawHeader>() * 8 {
        let mut bytes = good;
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(Header::decode(&bytes, len).is_err(), "bit {bit}");
    }
    for wrong in [0, len - 1, len + 1, u64::MAX] {
        let error = Header::decode(&good, wrong).unwrap_err();
        assert!(matches!(error, TablesError::Length { .. }), "{error}");
    }
    let error = Header::decode(&[0; HEADER_LEN], len).unwrap_err();
    assert_eq!(error, TablesError::Incomplete);
    assert!(header().check_key(&Digest::of(b"stack")).is_ok());
    assert!(header().check_key(&Digest::of(b"other")).is_err());
}

#[test]
fn impossible_numbers_of_items_are_refused() {
    let counts = header().counts;
    for wrong in [
        Counts {
            layers: 0,
            ..counts
        },
        Counts {
            layers: MAX_LAYERS + 1,
            ..counts
        },
        Counts {
            nodes: u64::MAX / NODE_LEN,
            ..counts
        },
        Counts {
            segments: u64::MAX / 2,
            ..counts
        },
        Counts {
            bases: u64::MAX,
            ..counts
        },
        Counts {
            starts: 1 << 62,
            ..counts
        },
    ] {
        assert_eq!(wrong.layout(), None, "{wrong:?}");
        let bytes = Header {
            counts: wrong,
            ..header()
        };
        assert!(Header::decode(&bytes.encode(), 1 << 40).is_err());
    }
}

#[test]
fn impossible_records_are_refused() {
    let changes: [fn(&mut LayerRecord); 6] = [
        |record| record.payload.len += 1,
        |record| record.payload.offset = u64::MAX,
        |record| record.last_byte = Some((71_000, 1)),
        |record| record.trailer_at += 1,
        |record| record.trailer_at = u64::MAX,
        |record| (record.blob_len, record.zfile) = (u64::MAX, None),
    ];
    for (number, change) in changes.iter().enumerate() {
        let mut record = record();
        change(&mut record);
        let decoded = LayerRecord::decode(&record.encode());
        assert!(decoded.is_err(), "change {number}");
    }
    let good = record().encode();
    for bit in 0..good.len() * 8 {
        let mut bytes = good;
        bytes[bit / 8] ^= 1 << (bit % 8);
        // Neither a panic nor a record that breaks a rule.
        if let Ok(record) = LayerRecord::decode(&bytes) {
            assert!(record.payload.offset + record.payload.len <= record.blob_len);
        }
    }
}

#[test]
fn each_part_of_an_identity_counts() {
    let file = |at: usize| {
        let mut parts = [1; 7];
        if let Some(part) = parts.get_mut(at) {
            *part = 2;
        }
        let [device, inode, len, ..] = parts;
        let [.., a, b, c, d] = parts.map(u64::cast_signed);
        LayerIdentity::File {
            device,
            inode,
            len,
            modified: (a, b),
            changed: (c, d),
        }
    };
    let blob = LayerIdentity::Blob(Digest::of(b"blob"));
    let layers: Vec<_> = (0..8).map(file).chain([blob]).collect();
    let mut keys: Vec<_> = layers.iter().map(|layer| key([layer])).collect();
    keys.extend([key([]), key([&layers[0], &blob]), key([&blob, &layers[0]])]);
    keys.sort_unstable();
    let count = keys.len();
    keys.dedup();
    assert_eq!(keys.len(), count);
}

#[test]
fn the_checksum_of_parts_is_that_of_the_whole() {
    let bytes: Vec<u8> = (0..10_000_u32).map(|at| (at % 253) as u8).collect();
    let (mut whole, mut parts) = (Checksum::default(), Checksum::default());
    whole.update(&bytes);
    bytes.chunks(777).for_each(|part| parts.update(part));
    assert_eq!(whole, parts);
    let header = Header {
        content_checksum: whole.value(),
        ..header()
    };
    assert!(header.check_content(whole).is_ok());
    whole.update(&[0]);
    assert!(header.check_content(whole).is_err());
}

#[test]
fn a_file_that_was_written_a_moment_ago_is_not_settled() {
    let is_settled = |changed: (i64, i64), now: Duration| {
        let file = LayerIdentity::File {
            device: 1,
            inode: 1,
            len: 1,
            modified: (0, 0),
            changed,
        };
        file.is_settled(now)
    };
    let second = Duration::from_secs(1000);
    assert!(!is_settled((1000, 5), second), "in the future");
    assert!(!is_settled((1000, 5), second + Duration::from_millis(50)));
    assert!(is_settled((1000, 5), second + Duration::from_millis(51)));
    assert!(!is_settled((1000, 0), second + Duration::from_millis(1999)));
    assert!(is_settled((1000, 0), second + Duration::from_secs(2)));
    assert!(!is_settled((-1, 5), second));
    assert!(LayerIdentity::Blob(Digest::of(b"x")).is_settled(Duration::ZERO));
}
