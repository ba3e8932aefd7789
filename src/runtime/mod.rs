//! What every long-running process of ours needs, whatever it does: logs, metrics, health, TLS, a leader, an orderly end.
//!
//! Nothing here knows migrations. In: flags and files. Out: handles that the agent and the manager hold by value; no global
//! state but the log subscriber and rustls' crypto provider, which their crates make global.

pub mod client;
pub mod health;
pub mod lease;
pub mod metrics;
pub mod pulse;
mod serve;
pub mod shutdown;
pub mod telemetry;
pub mod tls;

/// A number between `low` and `high`, different each time: so that many processes do not act in step. Not for secrets, and not
/// for anything that has to be repeatable.
pub fn spread(low: f64, high: f64) -> f64 {
    use std::hash::BuildHasher;
    // The standard library seeds each of these differently; 53 bits fill a double between 0 and 1.
    let bits = std::collections::hash_map::RandomState::new().hash_one(0) >> 11;
    low + (high - low) * (bits as f64 / (1_u64 << 53) as f64)
}
