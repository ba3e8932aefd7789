//! One file a subcommand.

pub mod crd;
