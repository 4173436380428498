//! Checks that each layer is above the stack it was made upon.
//!
//! A layer above another stack would mix two disks without an error, so an image with such a layer is
//! refused. A layer names its parent by uuid. Some tools write no uuids, so layers made by this program
//! also have a record of the stack they were made upon ([`MadeUpon`]). A layer with neither is accepted.
//!
//! What is compared:
//!
//! | layer below | layer | compared |
//! |---|---|---|
//! | has a uuid | names its parent | the uuids, then the size of the disk if there is a record |
//! | has none, or: | names none | identity of the stack and size of the disk if there is a record |
//! | is missing | | nothing may be missing below a layer with a record |
//!
//! Other tools write parents into layers at the bottom, and above layers without a uuid. Without a
//! record, both are accepted.
#![cfg_attr(
    not(test),
    warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)
)]

use uuid::Uuid;

use super::error::Error;
use super::identity::{LayerId, StackId};
use super::made_upon::MadeUpon;
use crate::format::lsmt::Header;
use crate::source::LayerRef;

/// Action for a layer that is above another stack than the one it was made upon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lineage {
    /// Refuse the image.
    #[default]
    Checked,
    /// Refuse the image, but accept the upper part of an image without its bottom layers.
    CheckedPart,
    /// Log a warning and use the image.
    Ignored,
}

/// A layer in a stack. A uuid is nil if the layer has none.
#[derive(Clone, Debug)]
pub struct Placed {
    /// The layer.
    pub layer: LayerRef,
    /// Its uuid.
    pub uuid: Uuid,
    /// Uuid of its parent, the layer it was made upon.
    pub parent: Uuid,
    /// Size of its disk in bytes; 0 if not declared.
    pub size: u64,
    /// Record of the stack it was made upon, if it has one.
    pub made_upon: Option<MadeUpon>,
    /// Its identity, if known.
    pub id: Option<LayerId>,
}

impl Placed {
    /// Creates the entry of a layer with this header. The identity is known if the layer has a uuid.
    pub fn new(layer: LayerRef, header: &Header) -> Self {
        Self {
            layer,
            uuid: header.uuid,
            parent: header.parent_uuid,
            size: header.virtual_size,
            made_upon: MadeUpon::split(&header.message).1,
            id: LayerId::named(header.uuid),
        }
    }
}

/// A layer with those below and above it, which are compared with what it says.
struct LayerInStack<'p> {
    below: &'p [Placed],
    placed: &'p Placed,
    above: &'p [Placed],
}

impl<'p> LayerInStack<'p> {
    fn all(layers: &'p [Placed]) -> impl Iterator<Item = Self> {
        (0..layers.len()).filter_map(|number| {
            let (below, rest) = layers.split_at_checked(number)?;
            let (placed, above) = rest.split_first()?;
            Some(Self {
                below,
                placed,
                above,
            })
        })
    }

    /// The layer below, if it has a uuid and this layer names its parent.
    fn named(&self) -> Option<&'p Placed> {
        let below = self.below.last().filter(|below| !below.uuid.is_nil());
        below.filter(|_| !self.placed.parent.is_nil())
    }

    /// The record of the stack, if the identity of the stack below is compared.
    fn by_stack(&self) -> Option<MadeUpon> {
        let is_bottom = self.below.is_empty();
        self.placed
            .made_upon
            .filter(|_| self.named().is_none() && !is_bottom)
    }

    /// Identity of the stack below; `None` if the identity of a layer is unknown. In the upper part of an
    /// image, the record of the bottom layer identifies the missing layers.
    fn stack(&self) -> Option<StackId> {
        let bottom = self.below.first().and_then(|bottom| bottom.made_upon);
        let missing = bottom.map_or(StackId::EMPTY, |record| record.stack);
        self.below
            .iter()
            .try_fold(missing, |stack, layer| Some(stack.below(layer.id?)))
    }

    /// Returns the error of a layer that is above another stack; with `part`, bottom layers may be missing.
    fn error(&self, part: bool) -> Option<Error> {
        let Placed { layer, parent, .. } = self.placed;
        if let Some(below) = self.named().filter(|below| below.uuid != *parent) {
            return Some(Error::WrongParent {
                layer: layer.clone(),
                parent: *parent,
                below: below.layer.clone(),
                found: below.uuid,
            });
        }
        if self.named().is_none()
            && let Some(error) = self.below_its_parent()
        {
            return Some(error);
        }
        let record = self.placed.made_upon?;
        if self.below.is_empty() {
            let layer = layer.clone();
            return (!part).then_some(Error::NoParent { layer });
        }
        if let Some(found) = self.by_stack().and_then(|_| self.stack())
            && found != record.stack
        {
            return Some(Error::WrongStack {
                layer: layer.clone(),
                made_upon: record.stack,
                found,
            });
        }
        self.wrong_size(record)
    }

    fn below_its_parent(&self) -> Option<Error> {
        let Placed { layer, parent, .. } = self.placed;
        let is_parent = |above: &&Placed| !parent.is_nil() && above.uuid == *parent;
        let found = self.above.iter().find(is_parent)?;
        Some(Error::WrongOrder {
            layer: layer.clone(),
            parent: *parent,
            above: found.layer.clone(),
        })
    }

    fn wrong_size(&self, record: MadeUpon) -> Option<Error> {
        let sizes = self.below.iter().rev().map(|below| below.size);
        let found = sizes.into_iter().find(|size| *size > 0)?;
        (found != record.size).then(|| Error::WrongSize {
            layer: self.placed.layer.clone(),
            made_upon: record.size,
            found,
        })
    }
}

/// Whether identities are compared, so that those of all layers must be known.
pub fn needs_identities(layers: &[Placed]) -> bool {
    LayerInStack::all(layers).any(|layer| layer.by_stack().is_some())
}

impl Lineage {
    /// Converts the action to one for a stack that may be the upper part of an image.
    #[must_use]
    pub fn of_part(self) -> Self {
        match self {
            Self::Checked => Self::CheckedPart,
            other => other,
        }
    }

    /// Returns the errors of all layers of a stack, bottom first, that are above another stack than the one
    /// they were made upon.
    pub fn misplaced(self, layers: &[Placed]) -> impl Iterator<Item = Error> {
        self.misplaced_from(0, layers)
    }

    fn misplaced_from(self, first: usize, layers: &[Placed]) -> impl Iterator<Item = Error> {
        let part = self == Self::CheckedPart;
        let layers = LayerInStack::all(layers).skip(first);
        layers.filter_map(move |layer| layer.error(part))
    }

    /// Checks the layers of a stack, bottom first, from number `first` on.
    ///
    /// # Errors
    /// [`Error::WrongParent`], [`Error::WrongOrder`], [`Error::WrongStack`], [`Error::WrongSize`] and
    /// [`Error::NoParent`], if lineage is checked.
    pub fn check(self, first: usize, layers: &[Placed]) -> Result<(), Error> {
        for error in self.misplaced_from(first, layers) {
            match self {
                Self::Checked | Self::CheckedPart => return Err(error),
                Self::Ignored => log::warn!("used in spite of the order (--force): {error}"),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 20;

    fn stack(names: &[(u128, u128)]) -> Vec<Placed> {
        let placed = |(number, (uuid, parent)): (usize, &(u128, u128))| {
            let uuid = Uuid::from_u128(*uuid);
            Placed {
                layer: std::path::PathBuf::from(number.to_string()).into(),
                uuid,
                parent: Uuid::from_u128(*parent),
                size: SIZE,
                made_upon: None,
                id: Some(LayerId::named(uuid).unwrap_or(LayerId::Sampled(number as u64))),
            }
        };
        names.iter().enumerate().map(placed).collect()
    }

    /// The same, each layer but the bottom one with a record of the stack it lies upon.
    fn recorded(names: &[(u128, u128)]) -> Vec<Placed> {
        let mut layers = stack(names);
        let mut id = StackId::EMPTY;
        for layer in &mut layers {
            layer.made_upon = (id != StackId::EMPTY).then_some(MadeUpon {
                stack: id,
                size: SIZE,
            });
            id = id.below(layer.id.unwrap());
        }
        layers
    }

    fn error(layers: &[Placed]) -> Error {
        Lineage::Checked.check(0, layers).unwrap_err()
    }

    #[test]
    fn known_names_must_agree_and_unknown_ones_need_not() {
        for names in [
            &[(1, 0), (2, 1), (3, 2)][..],
            &[(1, 9), (2, 1)],
            &[(0, 0), (0, 0), (0, 0)],
            &[(1, 0), (0, 0), (3, 2)],
            &[(1, 0), (2, 0), (3, 2)],
            &[(0, 0), (2, 1)],
            &[],
        ] {
            let layers = stack(names);
            assert_eq!(Lineage::Checked.misplaced(&layers).count(), 0, "{names:?}");
        }
        let missing = stack(&[(1, 0), (3, 2)]);
        assert!(matches!(error(&missing), Error::WrongParent { .. }));
        Lineage::Ignored.check(0, &missing).unwrap();
        let swapped = stack(&[(1, 0), (3, 2), (2, 1), (4, 3)]);
        assert_eq!(Lineage::Checked.misplaced(&swapped).count(), 3);
        for reversed in [&[(2, 1), (1, 0)][..], &[(0, 0), (2, 1), (1, 0)]] {
            assert!(matches!(error(&stack(reversed)), Error::WrongOrder { .. }));
        }
    }

    #[test]
    fn a_record_tells_stacks_without_names_apart() {
        for names in [
            &[(0, 0), (0, 0), (0, 0)][..],
            &[(0, 0), (2, 0), (3, 2), (4, 3)],
            &[(1, 0), (0, 1), (3, 0)],
        ] {
            let whole = recorded(names);
            Lineage::Checked.check(0, &whole).unwrap();
            for missing in 0..names.len() - 1 {
                let mut rest = whole.clone();
                rest.remove(missing);
                assert_eq!(
                    Lineage::Checked.misplaced(&rest).count(),
                    1,
                    "{names:?} {missing}"
                );
                let part = Lineage::CheckedPart.misplaced(&rest).count();
                assert_eq!(part, usize::from(missing > 0), "{names:?} {missing}");
            }
        }
        // Frozen layers are missing between a layer without a name and the active one.
        let whole = recorded(&[(0, 0), (2, 0), (3, 2)]);
        let ends = [whole[0].clone(), whole[2].clone()];
        assert!(matches!(error(&ends), Error::WrongStack { .. }));
    }

    #[test]
    fn names_decide_before_records_but_sizes_count() {
        let mut layers = recorded(&[(1, 0), (2, 1), (3, 2)]);
        // As after a merge of the lower ones, under the name of the upper one of them.
        layers.remove(0);
        layers[0].made_upon = None;
        Lineage::Checked.check(0, &layers).unwrap();
        assert!(!needs_identities(&layers));
        layers[0].size = SIZE + 1;
        assert!(matches!(error(&layers), Error::WrongSize { .. }));
        layers[0].size = 0;
        Lineage::Checked.check(0, &layers).unwrap();
    }
}
