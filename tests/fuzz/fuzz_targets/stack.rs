//! Two or three files as a stack: what is merged and looked up agrees with itself.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ovbd_vhost::image::Image;
use ovbd_vhost::image::reader::Reader;
use ovbd_vhost::image::spec::Stack;
use ovbd_vhost::units::Sector;

#[path = "../file.rs"]
mod file;

fuzz_target!(|layers: (&[u8], &[u8], &[u8])| {
    let (bottom, middle, top) = layers;
    let files = [bottom, middle, top].map(file::Held::new);
    let Ok(image) = Image::open(&Stack::new(files.iter().map(file::Held::path))) else {
        return;
    };
    let mut last = 0;
    for segment in image.index().iter() {
        assert!(
            segment.start() >= last && segment.length() > 0,
            "out of order"
        );
        assert_eq!(image.index().find(segment.start()), Some(segment));
        assert_eq!(image.index().find(segment.end() - 1), Some(segment));
        last = segment.end();
    }
    let mut reader = Reader::new();
    let mut block = [0; 8192];
    let sectors = image.sectors().0;
    for start in [0, last.min(sectors) / 2, sectors.saturating_sub(16)] {
        let count = (sectors - start).min(16);
        let mut planned = 0;
        for piece in image.pieces(Sector(start), count) {
            assert!(!piece.is_empty());
            planned += piece.len();
        }
        assert_eq!(planned, count * 512);
        let _ = reader.read(&image, Sector(start), &mut block[..count as usize * 512]);
    }
});
