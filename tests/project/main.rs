//! The project itself: the shape of its sources, its dependencies, its scripts.

mod architecture;
mod contrib;
mod dependencies;
mod docs;
