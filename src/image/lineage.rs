//! Whether each layer lies upon the layer it was made upon.
//!
//! A layer above another one than its parent would yield a mix of two disks without an error, so an image
//! with such a layer is refused. Some tools write layers without a uuid, which cannot be compared. A
//! writable layer made by this project therefore also keeps the serial of its stack as its commit
//! message, which other tools ignore. A layer with neither is accepted.
#![cfg_attr(
    not(test),
    warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)
)]

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

/// A layer in its place in a stack. A uuid is nil if the layer has none.
#[derive(Clone, Debug)]
pub struct Placed {
    /// The layer.
    pub layer: LayerRef,
    /// Its uuid.
    pub uuid: Uuid,
    /// The uuid of its parent, the layer it was made upon.
    pub parent: Uuid,
    /// The stack it was made for and the one it lies upon, if the former is known.
    pub stack: Option<Stacks>,
}

/// Serials of two stacks.
#[derive(Clone, Debug)]
pub struct Stacks {
    /// The stack a layer was made for.
    pub made_for: String,
    /// The stack it lies upon.
    pub found: String,
}

/// How the commit message starts that keeps the serial of a stack.
const TAG: &str = "made upon ";

/// The commit message of a writable layer for a stack of this serial, and a disk of `size` bytes.
pub fn tag(serial: &str, size: u64) -> Vec<u8> {
    format!("{TAG}{serial}, {size} bytes").into_bytes()
}

/// The serial of the stack that a layer with this commit message was made for.
pub fn made_for(message: &[u8]) -> Option<String> {
    let text = str::from_utf8(message).ok()?.strip_prefix(TAG)?;
    let (serial, rest) = text.split_once(", ")?;
    let known = rest.ends_with(" bytes") && serial.starts_with("ovbd") && serial.len() == 20;
    known.then(|| serial.to_owned())
}

/// The layers of a stack, bottom first, that lie upon another layer than their parent: the error of
/// each.
pub fn misplaced(layers: &[Placed]) -> impl Iterator<Item = Error> + '_ {
    (0..layers.len()).filter_map(|number| {
        let (below, rest) = layers.split_at_checked(number)?;
        let (placed, above) = rest.split_first()?;
        let Placed { layer, parent, .. } = placed;
        let named = below.last().filter(|below| !below.uuid.is_nil());
        match named.filter(|_| !parent.is_nil()) {
            Some(below) => (below.uuid != *parent).then(|| Error::WrongParent {
                layer: layer.clone(),
                parent: *parent,
                below: below.layer.clone(),
                found: below.uuid,
            }),
            None => {
                let stack = placed.stack.as_ref();
                if let Some(stack) = stack.filter(|stack| stack.made_for != stack.found) {
                    return Some(Error::WrongStack {
                        layer: layer.clone(),
                        made_for: stack.made_for.clone(),
                        found: stack.found.clone(),
                    });
                }
                let is_parent = |above: &&Placed| !parent.is_nil() && above.uuid == *parent;
                let found = above.iter().find(is_parent)?;
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
    /// [`Error::WrongParent`], [`Error::WrongOrder`] and [`Error::WrongStack`], if lineage is checked.
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
            stack: None,
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
        let mut nameless = stack(&[(0, 0), (5, 0)]);
        let serial = "ovbd0123456789abcdef";
        assert_eq!(made_for(&tag(serial, 512)).as_deref(), Some(serial));
        for other in ["made upon", "made upon a Friday, 9 bytes", "", "ovbd"] {
            assert_eq!(made_for(other.as_bytes()), None);
        }
        let mut place = |found: &str| {
            nameless[1].stack = Some(Stacks {
                made_for: serial.to_owned(),
                found: found.to_owned(),
            });
            Lineage::Checked.check(&nameless)
        };
        place(serial).unwrap();
        let error = place("ovbd0123456789abcdee").unwrap_err();
        assert!(matches!(error, Error::WrongStack { .. }), "{error}");
        for reversed in [&[(2, 1), (1, 0)][..], &[(0, 0), (2, 1), (1, 0)]] {
            let error = Lineage::Checked.check(&stack(reversed)).unwrap_err();
            assert!(matches!(error, Error::WrongOrder { .. }), "{error}");
        }
    }
}
