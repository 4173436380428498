//! Lists that requests use again, so that serving one allocates nothing.

/// Boxes without an owner.
#[derive(Debug)]
pub struct Pool<T> {
    spare: Vec<Box<T>>,
}

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Self { spare: Vec::new() }
    }
}

impl<T> Pool<T> {
    /// A spare box, or a new one.
    #[inline]
    pub fn take(&mut self, new: impl FnOnce() -> T) -> Box<T> {
        self.spare.pop().unwrap_or_else(|| Box::new(new()))
    }

    /// Takes a box back.
    #[inline]
    pub fn give_back(&mut self, used: Box<T>) {
        self.spare.push(used);
    }
}
