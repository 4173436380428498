//! Whether each layer lies upon the layer it was made upon.
//!
//! A layer that lies upon another one yields a mix of two disks without an error, so an image with
//! such a layer is refused. Layers without a name, as some tools write them, cannot be compared, and
//! are accepted.

use uuid::Uuid;

use super::error::Error;
use crate::source::LayerRef;

/// What to do about a layer that lies upon another layer than its parent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lineage {
    /// Refuse the image.
    #[default]
    Checked,
    /// Log it, and use the image as it is.
    Ignored,
}

/// A layer in its place in a stack. Names are nil where the layer has none.
#[derive(Clone, Debug)]
pub struct Placed {
    /// The layer.
    pub layer: LayerRef,
    /// Its name.
    pub uuid: Uuid,
    /// Name of the layer it was made upon.
    pub parent: Uuid,
}

/// The layers of a stack, bottom first, that lie upon another layer than their parent: the error of
/// each.
pub fn misplaced(layers: &[Placed]) -> impl Iterator<Item = Error> + '_ {
    (0..layers.len()).filter_map(|number| {
        let (below, rest) = layers.split_at_checked(number)?;
        let (placed, above) = rest.split_first()?;
        let Placed { layer, parent, .. } = placed;
        if parent.is_nil() {
            return None;
        }
        match below.last().filter(|below| !below.uuid.is_nil()) {
            Some(below) => (below.uuid != *parent).then(|| Error::WrongParent {
                layer: layer.clone(),
                parent: *parent,
                below: below.layer.clone(),
                found: below.uuid,
            }),
            None => {
                let found = above.iter().find(|above| above.uuid == *parent)?;
                Some(Error::WrongOrder {
                    layer: layer.clone(),
                    parent: *parent,
                    above: found.layer.clone(),
                })
            }
        }
    })
}

impl Lineage {
    /// Refuses a stack, bottom first, of which a layer does not lie upon its parent.
    ///
    /// # Errors
    /// [`Error::WrongParent`] and [`Error::WrongOrder`], if lineage is checked.
    pub fn check(self, layers: &[Placed]) -> Result<(), Error> {
        for error in misplaced(layers) {
            match self {
                Self::Checked => return Err(error),
                Self::Ignored => log::warn!("{error}"),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stack(names: &[(u128, u128)]) -> Vec<Placed> {
        let placed = |(number, (uuid, parent)): (usize, &(u128, u128))| Placed {
            layer: LayerRef::File(number.to_string().into()),
            uuid: Uuid::from_u128(*uuid),
            parent: Uuid::from_u128(*parent),
        };
        names.iter().enumerate().map(placed).collect()
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
            assert_eq!(misplaced(&stack(names)).count(), 0, "{names:?}");
        }
        let missing = stack(&[(1, 0), (3, 2)]);
        let error = Lineage::Checked.check(&missing).unwrap_err();
        assert!(matches!(error, Error::WrongParent { .. }), "{error}");
        assert!(Lineage::Ignored.check(&missing).is_ok());
        let swapped = stack(&[(1, 0), (3, 2), (2, 1), (4, 3)]);
        assert_eq!(misplaced(&swapped).count(), 3);
        for reversed in [&[(2, 1), (1, 0)][..], &[(0, 0), (2, 1), (1, 0)]] {
            let error = Lineage::Checked.check(&stack(reversed)).unwrap_err();
            assert!(matches!(error, Error::WrongOrder { .. }), "{error}");
        }
    }
}
