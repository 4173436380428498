//! The `ovbd` image tool: arguments only.

fn main() {}
