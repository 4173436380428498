//! What the `ovbd` image tool does.
