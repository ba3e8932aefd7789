//! KubeVirt's stand-in, under test itself, in a whole cluster: kube-scheduler places its target pods, KWOK runs them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod admission;
mod automatic;
mod queue;
mod scene;
mod way;
