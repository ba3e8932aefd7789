//! The pure core: from a pattern of writes and a question to a forecast.
//!
//! Nothing here knows Kubernetes, a hypervisor, a clock or a source of randomness: time and seeds are arguments.

pub mod forecast;
pub mod kubevirt;
pub mod pattern;
pub mod units;
