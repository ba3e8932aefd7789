//! The pure core: from a pattern of writes and a question to a forecast.
//!
//! Nothing here knows Kubernetes, a hypervisor, a clock or a source of randomness: time and seeds are arguments.

pub mod classic;
pub mod curve;
pub mod forecast;
pub mod kubevirt;
pub mod lcb;
pub mod learn;
pub mod pattern;
pub mod plan;
pub mod predict;
pub mod remedy;
pub mod replay;
mod steer;
pub mod units;
