//! The project itself: the shape of its sources, its dependencies, its scripts.

mod architecture;
mod circles;
mod contrib;
mod dependencies;
mod docs;
