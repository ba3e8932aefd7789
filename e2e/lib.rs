//! What the tests and the demonstration run on: real guests, a real control plane, KubeVirt's part. Never shipped.

pub mod lab;
