//! Scatter lists: the memory of a request as slices in order, used as one buffer.
//!
//! A piece is a [`VolatileSlice`], never a `&mut [u8]`: a reference would promise the compiler that
//! nothing else accesses the bytes, but a guest may write to them at any time.

use vm_memory::VolatileSlice;

/// A list of memory pieces, read or written in order as one buffer.
#[derive(Debug, Default)]
pub struct Scatter<'m> {
    pieces: Vec<VolatileSlice<'m>>,
    /// For each piece, the number of bytes up to its end, for a binary search by position.
    ends: Vec<usize>,
}

impl<'m> Scatter<'m> {
    /// Creates an empty list.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends a piece, unless it is empty: every piece in the list has at least one byte.
    pub fn push(&mut self, piece: VolatileSlice<'m>) {
        if !piece.is_empty() {
            self.ends.push(self.len() + piece.len());
            self.pieces.push(piece);
        }
    }

    /// Removes all pieces and keeps the allocation.
    pub fn clear(&mut self) {
        self.pieces.clear();
        self.ends.clear();
    }

    /// Number of pieces that fit without another allocation.
    pub fn capacity(&self) -> usize {
        self.pieces.capacity()
    }

    /// Number of bytes in all pieces.
    pub fn len(&self) -> usize {
        self.ends.last().copied().unwrap_or(0)
    }

    /// Whether the list has no byte.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// The pieces, in order.
    pub fn pieces(&self) -> &[VolatileSlice<'m>] {
        &self.pieces
    }

    /// Removes the last `count` bytes, or all if there are fewer.
    pub fn truncate_by(&mut self, mut count: usize) {
        while count > 0 {
            let (Some(last), Some(end)) = (self.pieces.last_mut(), self.ends.last_mut()) else {
                return;
            };
            if let Some(keep) = last.len().checked_sub(count).filter(|keep| *keep > 0)
                && let Ok(kept) = last.subslice(0, keep)
            {
                *last = kept;
                *end -= count;
                return;
            }
            count -= last.len();
            self.pieces.pop();
            self.ends.pop();
        }
    }

    /// Returns a cursor at byte `position` of the list.
    #[inline]
    pub fn cursor(&self, position: usize) -> Cursor<'_, 'm> {
        // Most requests have all their data in one piece.
        if self.ends.first().is_some_and(|end| position < *end) {
            let (pieces, offset) = (self.pieces.as_slice(), position);
            return Cursor { pieces, offset };
        }
        let before = self.ends.partition_point(|end| *end <= position);
        debug_assert!(position <= self.len(), "a cursor past the end");
        let start = before.checked_sub(1).map_or(0, |last| self.ends[last]);
        Cursor {
            pieces: &self.pieces[before..],
            offset: position - start,
        }
    }
}

/// A position in a [`Scatter`], which each operation advances.
///
/// Advancing past the end is a bug of the caller, which knows the length: the surplus is dropped, and
/// debug builds panic.
#[derive(Clone, Copy, Debug)]
pub struct Cursor<'s, 'm> {
    pieces: &'s [VolatileSlice<'m>],
    offset: usize,
}

impl<'m> Cursor<'_, 'm> {
    /// The rest of the current piece; `None` at the end of the list.
    fn rest(&self) -> Option<VolatileSlice<'m>> {
        self.pieces.first()?.offset(self.offset).ok()
    }

    /// Advances by `count` bytes.
    pub fn skip(&mut self, mut count: usize) {
        while count > 0 {
            let Some(first) = self.pieces.first() else {
                debug_assert!(false, "cursor moved past the end of its scatter list");
                return;
            };
            let left = first.len() - self.offset;
            if count < left {
                self.offset += count;
                return;
            }
            count -= left;
            self.pieces = &self.pieces[1..];
            self.offset = 0;
        }
    }

    /// Returns the next `len` bytes and advances past them, if they lie in one piece; otherwise does
    /// nothing.
    pub fn take_contiguous(&mut self, len: usize) -> Option<VolatileSlice<'m>> {
        let piece = self.rest()?.subslice(0, len).ok()?;
        self.skip(len);
        Some(piece)
    }

    /// Calls `each` with the pieces of the next `len` bytes and advances past them.
    pub fn take(&mut self, mut len: usize, mut each: impl FnMut(VolatileSlice<'m>)) {
        while len > 0 {
            let Some(rest) = self.rest() else {
                debug_assert!(false, "cursor moved past the end of its scatter list");
                return;
            };
            let part = len.min(rest.len());
            if let Ok(piece) = rest.subslice(0, part) {
                each(piece);
            }
            self.skip(part);
            len -= part;
        }
    }

    /// Copies `bytes` into the list and advances past them.
    pub fn write(&mut self, mut bytes: &[u8]) {
        self.take(bytes.len(), |piece| {
            let (now, later) = bytes.split_at(piece.len());
            piece.copy_from(now);
            bytes = later;
        });
    }

    /// Copies the next bytes of the list into `bytes` and advances past them.
    pub fn read(&mut self, bytes: &mut [u8]) {
        let mut filled = 0;
        self.take(bytes.len(), |piece| {
            filled += piece.copy_to(&mut bytes[filled..]);
        });
    }

    /// Fills the next `len` bytes with zeros and advances past them.
    pub fn zero(&mut self, len: usize) {
        const ZEROS: [u8; 4096] = [0; 4096];
        self.take(len, |piece| {
            let mut at = 0;
            while at < piece.len() {
                let part = ZEROS.len().min(piece.len() - at);
                if let Ok(target) = piece.subslice(at, part) {
                    target.copy_from(&ZEROS[..part]);
                }
                at += part;
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_cross_pieces_in_order() {
        let (mut a, mut b, mut c) = ([0u8; 3], [0u8; 1], [0u8; 4]);
        let mut scatter = Scatter::new();
        for piece in [&mut a[..], &mut b[..], &mut c[..]] {
            scatter.push(VolatileSlice::from(piece));
        }
        assert_eq!(scatter.len(), 8);
        let mut cursor = scatter.cursor(1);
        cursor.write(&[1, 2, 3, 4]);
        assert!(
            cursor.take_contiguous(4).is_none(),
            "only three bytes are left"
        );
        assert_eq!(cursor.take_contiguous(3).map(|piece| piece.len()), Some(3));
        drop(scatter);
        assert_eq!((a, b, c), ([0, 1, 2], [3], [4, 0, 0, 0]));
    }

    #[test]
    fn a_cursor_at_every_place() {
        let mut bytes = [0u8; 9];
        let (a, rest) = bytes.split_at_mut(1);
        let (b, c) = rest.split_at_mut(5);
        let mut scatter = Scatter::new();
        for piece in [a, b, c] {
            scatter.push(VolatileSlice::from(piece));
        }
        for position in (0..9).rev() {
            scatter.cursor(position).write(&[position as u8]);
        }
        assert!(scatter.cursor(9).take_contiguous(1).is_none());
        drop(scatter);
        assert_eq!(bytes, [0, 1, 2, 3, 4, 5, 6, 7, 8]);
    }

    #[test]
    fn reads_cross_pieces_in_order() {
        let (mut a, mut b) = ([1u8, 2, 3], [4u8, 5]);
        let mut scatter = Scatter::new();
        for piece in [&mut a[..], &mut b[..]] {
            scatter.push(VolatileSlice::from(piece));
        }
        let (mut first, mut second) = ([0; 3], [0; 1]);
        let mut cursor = scatter.cursor(1);
        cursor.read(&mut first);
        cursor.read(&mut second);
        assert_eq!((first, second), ([2, 3, 4], [5]));
    }

    #[test]
    fn zero_and_truncate() {
        let (mut a, mut b) = (vec![7u8; 9000], vec![7u8; 10]);
        let mut scatter = Scatter::new();
        scatter.push(VolatileSlice::from(&mut a[..]));
        scatter.push(VolatileSlice::from(&mut b[..]));
        scatter.truncate_by(11);
        assert_eq!((scatter.len(), scatter.pieces().len()), (8999, 1));
        scatter.cursor(1).zero(8998);
        drop(scatter);
        assert_eq!((a[0], a[8999], b[0]), (7, 7, 7));
        assert!(a[1..8999].iter().all(|byte| *byte == 0));
    }
}
