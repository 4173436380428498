//! The `ovbd-vhost` daemon: from command line to running device.
