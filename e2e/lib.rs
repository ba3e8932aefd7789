//! The laboratory: a real control plane, KubeVirt's part, real guests. Never shipped.

pub mod cluster;
pub mod kubevirt;
