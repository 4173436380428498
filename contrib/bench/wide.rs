//! Stacks of layers with many small mappings and next to no data, to see what indexes cost.

use std::path::{Path, PathBuf};

use ovbd_vhost::format::lsmt::Mapping;
use ovbd_vhost::units::Sector;

use common::layers::{self, LayerBuilder, Pack};

/// Sectors of a mapping: one block.
pub const SECTORS: u64 = 8;

/// The disk between two mappings' starts. Half of it is in no layer.
const STRIDE: u64 = 2 * SECTORS;

/// Mapping `number` of `count` layers' together: what neighbours on the disk hold lies in layers far
/// apart, and nothing can be joined.
pub fn mapping(number: u64) -> Mapping {
    let length = SECTORS as u16;
    Mapping::data(Sector(number * STRIDE), length, Sector(8)).expect("a small disk")
}

/// Sectors of the disk with so many mappings.
pub fn sectors(mappings: u64) -> u64 {
    mappings * STRIDE
}

/// Writes `count` LZ4 layers with `mappings` mappings in all to `dir`, bottom first.
pub fn write(dir: &Path, count: u64, mappings: u64) -> Vec<PathBuf> {
    let layer = |layer| {
        let builder = LayerBuilder::new(sectors(mappings) * 512).data(0, &[0x5a; 4096]);
        let numbers = (0..mappings).filter(|number| number % count == layer && *number > 0);
        let filled = numbers.fold(builder, |builder, number| {
            builder.entry(mapping(number).encode())
        });
        let stored = layers::zfile(&filled.lsmt(), Pack::default());
        layers::write(dir, &format!("{layer:03}.obd"), &stored)
    };
    (0..count).map(layer).collect()
}
