//! What the tests and the demonstration run on: a real control plane, KubeVirt's part, real guests. Never shipped.

pub mod cluster;
pub mod kubevirt;
pub mod lab;
pub mod process;
pub mod scenario;
pub mod skip;
pub mod soak;
pub mod world;
