//! One file a subcommand.

pub mod agent;
pub mod crd;
