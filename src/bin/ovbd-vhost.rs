//! The `ovbd-vhost` daemon: arguments only.

fn main() {}
