//! A stack as the tool reads it: layers, a writable layer above them, or both.

use std::fs::{self, Metadata};
use std::iter;
use std::ops::Range;

use super::Error;
use super::open_files::OpenFiles;
use crate::format::lsmt::MAX_SECTORS;
use crate::image::Image;
use crate::image::layer::Layer;
use crate::image::lineage::Placed;
use crate::image::made_upon::MadeUpon;
use crate::image::reader::Reader;
use crate::image::segment;
use crate::source::{Blob, LayerRef};
use crate::units::{SECTOR_SIZE, Sector, SectorRange, Sectors};
use crate::writable::Paths;
use crate::writable::extent_map::{ExtentMap, Place};
use crate::writable::load::{Access, LoadedLayer, load};
use crate::writable::manifest::Pairs;

/// Size of the largest disk, in bytes.
const MAX_SIZE: u64 = MAX_SECTORS.bytes();

/// Layers and the writable layer above them, loaded. All threads share it.
#[derive(Debug)]
pub struct LoadedStack {
    image: Option<Image>,
    upper: Option<WritableLayerReader>,
    /// Size of the disk.
    size: u64,
}

/// An open writable layer, locked against writers.
#[derive(Debug)]
pub struct WritableLayerReader {
    paths: Paths,
    layer: LoadedLayer,
    /// The data file.
    blob: Blob,
}

impl WritableLayerReader {
    /// Opens a writable layer and reads its map into `map`, which is empty.
    ///
    /// # Errors
    /// [`writable::Error`](crate::writable::Error) if a file cannot be read, or another process writes to the layer.
    pub fn open(paths: &Paths, map: ExtentMap) -> Result<Self, Error> {
        Self::of(paths, load(paths, Access::Read, map)?)
    }

    /// A writable layer that is loaded.
    ///
    /// # Errors
    /// Those of [`LoadedLayer::data_blob`].
    pub fn of(paths: &Paths, layer: LoadedLayer) -> Result<Self, Error> {
        let blob = layer.data_blob(paths)?;
        let paths = paths.clone();
        Ok(Self { paths, layer, blob })
    }

    /// Returns the paths of its files.
    pub fn paths(&self) -> &Paths {
        &self.paths
    }

    /// Returns what its files hold.
    pub fn layer(&self) -> &LoadedLayer {
        &self.layer
    }

    /// Returns the data file as a layer.
    pub fn layer_ref(&self) -> LayerRef {
        LayerRef::from(&self.paths.data)
    }

    /// Returns the layer as a member of a stack.
    pub fn placed(&self) -> Placed {
        Placed::new(self.layer_ref(), self.layer.header())
    }

    /// Size of the data file in bytes.
    pub fn data_len(&self) -> u64 {
        self.blob.len()
    }

    /// Whether these bytes of the data file are in a hole: they read as zeros.
    pub fn is_hole(&self, bytes: &Range<u64>) -> bool {
        self.blob.data_from(bytes.start) >= bytes.end
    }

    /// Fills `into` with the data file's content from its sector `from` on.
    ///
    /// # Errors
    /// The file cannot be read, or ends earlier.
    pub fn read(&self, from: Sector, into: &mut [u8]) -> Result<(), Error> {
        let offset = from.byte();
        let there = self.blob.len().saturating_sub(offset);
        let missing = (into.len() as u64).saturating_sub(there);
        // The data file of a sparse layer may end inside its last sector.
        let part = match missing < SECTOR_SIZE {
            true => into.len() - missing as usize,
            false => into.len(),
        };
        let (part, rest) = into.split_at_mut(part);
        rest.fill(0);
        let read = self.blob.read_exact_at(part, offset);
        Ok(read.map_err(crate::writable::Error::from)?)
    }
}

/// Sectors of a disk that come from one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The sectors.
    pub range: SectorRange,
    /// Source of their content.
    pub content: Content,
}

/// Source of the content of a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Zeros.
    Zeroed,
    /// The layer with this number, counted from the bottom.
    Layer(u16),
    /// The writable layer.
    WritableLayer,
}

impl LoadedStack {
    /// Reads the layers and the writable layer, and follows the snapshots of the latter.
    ///
    /// # Errors
    /// A file cannot be read, or a process writes to the writable layer.
    pub fn load(mut files: OpenFiles) -> Result<Self, Error> {
        let upper = match open_upper(&files)? {
            Some((pairs, upper)) => {
                files.add_frozen(pairs.frozen());
                Some(upper)
            }
            None => None,
        };
        let lineage = files.lineage();
        let image = match (files.layers(), &upper) {
            ([], Some(_)) => Image::empty(lineage),
            _ => files.load()?,
        };
        if let Some(upper) = &upper {
            image.check_above(&[upper.placed()])?;
        }
        let image = Some(image).filter(|image| !image.layers().is_empty());
        Ok(Self::of(image, upper))
    }

    /// A disk of loaded layers and a writable layer.
    pub fn of(image: Option<Image>, upper: Option<WritableLayerReader>) -> Self {
        let said = upper
            .as_ref()
            .map_or(0, |upper| upper.layer.header().virtual_size);
        let size = match said {
            0 => image.as_ref().map_or(0, Image::size),
            size => size,
        };
        Self { image, upper, size }
    }

    /// What the lowest layer was made upon, if it has a record of that.
    pub fn made_upon(&self) -> Option<MadeUpon> {
        let bottom = self
            .image
            .iter()
            .flat_map(Image::layers)
            .map(Layer::trailer);
        let upper = self.upper.iter().map(|upper| upper.layer.header());
        let bottom = bottom.chain(upper).next()?;
        MadeUpon::split(&bottom.message).1
    }

    /// Takes the layers below the upper.
    pub fn into_image(self) -> Option<Image> {
        self.image
    }

    /// The layers below the upper.
    pub fn image(&self) -> Option<&Image> {
        self.image.as_ref()
    }

    /// The writable layer.
    pub fn upper(&self) -> Option<&WritableLayerReader> {
        self.upper.as_ref()
    }

    /// Size of the disk in bytes; 0 if a writable layer without layers below does not give it.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Metadata of its files, without those that cannot be examined.
    pub fn inputs(&self) -> impl Iterator<Item = Metadata> + '_ {
        let layers = self.image.iter().flat_map(Image::layers);
        let layers = layers.filter_map(|layer| layer.container().blob().metadata().ok());
        let upper = self.upper.iter();
        let upper = upper.flat_map(|upper| [&*upper.paths.data, &*upper.paths.index]);
        layers.chain(upper.filter_map(|path| fs::metadata(path).ok()))
    }

    /// First byte from `start` on and before `end` that may not be zero.
    pub fn data_from(&self, start: u64, end: u64) -> Option<u64> {
        let image = self.image.as_ref();
        let below = image.and_then(|image| super::unit::data_from(image, start, end));
        let sectors = SectorRange::of_bytes(&(start..end));
        let within = self.upper.iter();
        let mut within = within.flat_map(|upper| upper.layer.map().within(sectors));
        let above = within.find(|extent| extent.place() != Place::Zero);
        let above = above.map(|extent| extent.start().byte().max(start));
        [below, above].into_iter().flatten().min()
    }

    /// Fills `into`, which has whole sectors, with the content of the layers from sector `start`
    /// on. The range may lie beyond the disk.
    ///
    /// # Errors
    /// A layer cannot be read or decoded.
    pub fn read(&self, reader: &mut Reader, start: Sector, into: &mut [u8]) -> Result<(), Error> {
        let (mut at, mut rest) = (start, into);
        let end = start + Sectors::whole_in(rest.len() as u64);
        if let Some(upper) = &self.upper {
            let mut extents = upper
                .layer
                .map()
                .within(SectorRange::new(start, end))
                .peekable();
            while let Some(mut extent) = extents.next() {
                // Extents that continue each other in the file are read at once.
                while let Some(both) = extents.peek().and_then(|next| extent.joined(next)) {
                    extent = both;
                    extents.next();
                }
                // Parts of a slice's length.
                let below = (extent.start() - at).bytes() as usize;
                let (part, later) = rest.split_at_mut(below);
                self.read_image(reader, at, part)?;
                let (part, later) = later.split_at_mut(extent.len().bytes() as usize);
                match extent.place() {
                    Place::Zero => part.fill(0),
                    Place::Data(from) => upper.read(from, part)?,
                }
                (at, rest) = (extent.end(), later);
            }
        }
        self.read_image(reader, at, rest)
    }

    /// The same from the layers below the upper.
    fn read_image(&self, reader: &mut Reader, start: Sector, into: &mut [u8]) -> Result<(), Error> {
        match &self.image {
            // A layer above may make the disk larger: nothing is beyond its end.
            Some(image) => reader.read(image.sized(MAX_SIZE), start, into)?,
            None => into.fill(0),
        }
        Ok(())
    }

    /// Pieces of the disk in order; ranges without a mapping are left out.
    pub fn pieces(&self) -> impl Iterator<Item = Piece> + '_ {
        let end = match self.size {
            0 => Sector(0) + MAX_SECTORS,
            size => Sector::at_or_after(size),
        };
        let disk = SectorRange::new(Sector(0), end);
        let pieces = self.all_pieces().map(move |piece| Piece {
            range: piece.range.intersection(disk),
            ..piece
        });
        pieces.take_while(|piece| !piece.range.is_empty())
    }

    /// The same, and pieces beyond the end of the disk.
    pub fn all_pieces(&self) -> impl Iterator<Item = Piece> + '_ {
        let image = self.image.as_ref();
        let unders = image.into_iter().flat_map(|image| image.index().iter());
        let unders = unders.map(|segment| Piece {
            range: segment.range(),
            content: match segment.content() {
                segment::SegmentContent::Zeroed => Content::Zeroed,
                segment::SegmentContent::Data { layer, .. } => Content::Layer(layer),
            },
        });
        let overs = self.upper.iter().flat_map(|upper| upper.layer.map().iter());
        let overs = overs.map(|extent| Piece {
            range: extent.range(),
            content: match extent.place() {
                Place::Zero => Content::Zeroed,
                Place::Data(_) => Content::WritableLayer,
            },
        });
        overlaid(unders, overs)
    }
}

/// Opens the active writable layer, and finds the pairs of files that snapshots froze.
fn open_upper(files: &OpenFiles) -> Result<Option<(Pairs, WritableLayerReader)>, Error> {
    loop {
        let Some(pairs) = files.pairs()? else {
            return Ok(None);
        };
        let upper = WritableLayerReader::open(pairs.active(), ExtentMap::new());
        // The process that held the lock may have taken a snapshot before it ended.
        if files.pairs()?.as_ref() == Some(&pairs) {
            return Ok(Some((pairs, upper?)));
        }
    }
}

/// Merges two lists of pieces; those of `overs` hide those of `unders`.
fn overlaid(
    unders: impl Iterator<Item = Piece>,
    overs: impl Iterator<Item = Piece>,
) -> impl Iterator<Item = Piece> {
    let (mut unders, mut overs) = (unders.peekable(), overs.peekable());
    let mut done = Sector(0);
    iter::from_fn(move || {
        while unders.next_if(|under| under.range.end() <= done).is_some() {}
        let Some(under) = unders.peek() else {
            return overs.next();
        };
        let start = under.range.start().max(done);
        if let Some(over) = overs.next_if(|over| over.range.start() <= start) {
            done = over.range.end();
            return Some(over);
        }
        let next = overs.peek().map(|over| over.range.start());
        done = next.map_or(under.range.end(), |next| next.min(under.range.end()));
        Some(Piece {
            range: SectorRange::new(start, done),
            content: under.content,
        })
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pieces(lens: &[(u64, u64)], content: Content) -> Vec<Piece> {
        let mut at = Sector(0);
        let piece = |(gap, len): &(u64, u64)| {
            let start = at + Sectors(*gap);
            at = start + Sectors(*len);
            let range = SectorRange::new(start, at);
            Piece { range, content }
        };
        lens.iter().map(piece).collect()
    }

    fn sectors_of(piece: &Piece) -> Range<usize> {
        piece.range.start().0 as usize..piece.range.end().0 as usize
    }

    proptest! {
        #[test]
        fn overs_hide_unders(
            unders in prop::collection::vec((0..5u64, 1..9u64), 0..20),
            overs in prop::collection::vec((0..5u64, 1..9u64), 0..20),
        ) {
            let unders = pieces(&unders, Content::Layer(0));
            let overs = pieces(&overs, Content::WritableLayer);
            let mut model = vec![None; 400];
            for piece in unders.iter().chain(&overs) {
                model[sectors_of(piece)].fill(Some(piece.content));
            }
            let mut found = vec![None; 400];
            let mut last = Sector(0);
            for piece in overlaid(unders.into_iter(), overs.into_iter()) {
                prop_assert!(piece.range.start() >= last && !piece.range.is_empty());
                last = piece.range.end();
                found[sectors_of(&piece)].fill(Some(piece.content));
            }
            prop_assert_eq!(found, model);
        }
    }
}
