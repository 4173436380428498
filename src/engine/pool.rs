//! Pool of lists that requests reuse, so that serving a request allocates nothing.

/// Spare boxes.
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
    /// Takes a spare box, or makes a new one.
    #[inline]
    pub fn take(&mut self, new: impl FnOnce() -> T) -> Box<T> {
        self.spare.pop().unwrap_or_else(|| Box::new(new()))
    }

    /// Puts a box back.
    #[inline]
    pub fn give_back(&mut self, used: Box<T>) {
        self.spare.push(used);
    }
}
