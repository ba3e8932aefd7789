//! What the tests and the demonstration run on: a real control plane, KubeVirt's part, real guests. Never shipped.

pub mod cluster;
pub mod kubevirt;
pub mod lab;
mod mover;
pub mod process;
pub mod skip;
pub mod soak;
pub mod world;
