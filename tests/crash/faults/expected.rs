//! What a disk may hold after a crash.

use common::recorder::Op;
use ovbd_vhost::writable::Volume;

use crate::disk::{Content, content};

/// What a disk may be: its size, as if that was the content of a sector, then what each sector may hold.
pub(super) type Possible = Vec<Vec<Content>>;

/// The place of a sector in what a disk is.
pub(super) fn place(sector: u64) -> usize {
    1 + sector as usize
}

/// The size of a disk, as if that was the content of a sector.
pub(super) fn size_as_content(sectors: u64) -> Content {
    let mut content = [0; 512];
    content[..8].copy_from_slice(&sectors.to_le_bytes());
    content
}

/// What a disk is: its size, then what its sectors hold.
pub(super) fn state(volume: &Volume) -> Vec<Content> {
    let size = size_as_content(volume.sectors().0);
    [size].into_iter().chain(content(volume)).collect()
}

pub(super) fn add(possible: &mut Possible, sector: usize, content: Content) {
    if !possible[sector].contains(&content) {
        possible[sector].push(content);
    }
}

pub(super) fn add_all(possible: &mut Possible, more: &Possible) {
    for (sector, contents) in more.iter().enumerate() {
        contents
            .iter()
            .for_each(|content| add(possible, sector, *content));
    }
}

/// What may be found after a crash.
#[derive(Clone)]
pub(super) struct Expected {
    /// After a kill.
    pub(super) killed: Possible,
    /// After a power loss.
    pub(super) no_power: Possible,
}

impl Expected {
    /// Storage lost data: nothing but what was flushed is certain.
    pub(super) fn lose(&mut self) {
        add_all(&mut self.killed, &self.no_power);
    }
}

/// Whether a sync of a data file failed.
pub(super) fn lost_data(log: &[Op], range: std::ops::Range<usize>) -> bool {
    log[range].iter().any(|op| {
        let Op::LostSync { file, .. } = op else {
            return false;
        };
        log.iter().any(|op| match op {
            Op::Create { name, file: own } => {
                let name = name.to_string_lossy();
                own == file && name.starts_with("data") && !name.contains("snapshots")
            }
            _ => false,
        })
    })
}
