//! QEMU's migration settings, borrowed: taken down before a dry run, put back after it, and compared.
//!
//! In: a monitor. Out: what was set, or which setting is not what it was. A run borrows the machinery that the next real migration uses:
//! a `switchover-ack` left behind would keep that one from ever ending.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{Compression, DryRunError, Plan};
use crate::{
    model::units::{Bandwidth, BytesPerSecond},
    qemu::{
        migration::{self, UNCAPPED},
        monitor::Monitor,
        qmp::QmpError,
    },
};

/// Capabilities that stay as they are: they say how QEMU talks, not how it migrates.
const UNTOUCHED: [&str; 1] = ["events"];
/// Without both, QEMU could complete a dry run and stop the guest.
const NEVER_WITHOUT: [&str; 2] = ["return-path", "switchover-ack"];

/// Everything that QEMU tells of its migration settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Settings {
    capabilities: BTreeMap<String, bool>,
    parameters: Map<String, Value>,
}

impl Settings {
    /// What is set now.
    pub(super) async fn read(monitor: &mut Monitor) -> Result<Self, QmpError> {
        Ok(Self { capabilities: migration::capabilities(monitor).await?, parameters: migration::all_parameters(monitor).await? })
    }

    /// What a dry run of this plan sets, and nothing else: a capability that somebody left on (auto-converge slows the guest
    /// down, post-copy could hand it over) is off during it.
    pub(super) fn of(&self, plan: &Plan) -> Result<Self, DryRunError> {
        let mut wanted = vec!["events", "return-path", "switchover-ack"];
        if plan.channels > 0 {
            wanted.push("multifd");
        }
        if plan.compression == Compression::Xbzrle {
            wanted.push("xbzrle");
        }
        for name in &wanted {
            if !self.capabilities.contains_key(*name) && *name != "events" {
                return Err(DryRunError::Lacks { capability: (*name).to_owned() });
            }
        }
        let on = |name: &str, now: bool| wanted.contains(&name) || (now && UNTOUCHED.contains(&name));
        let capabilities = self.capabilities.iter().map(|(name, now)| (name.clone(), on(name, *now))).collect();
        let mut parameters = self.parameters.clone();
        // With multifd QEMU does not honour its own cap: the sink paces.
        let cap = if plan.channels > 0 { Bandwidth::Unlimited } else { plan.bandwidth };
        parameters.insert("max-bandwidth".to_owned(), json!(cap.cap().unwrap_or(BytesPerSecond(UNCAPPED))));
        parameters.insert("downtime-limit".to_owned(), json!(plan.longest_limit_ms()));
        if plan.channels > 0 {
            let method = if plan.compression == Compression::Zstd { "zstd" } else { "none" };
            parameters.insert("multifd-channels".to_owned(), json!(plan.channels));
            parameters.insert("multifd-compression".to_owned(), json!(method));
        }
        // Left over from a migration with TLS: the sink speaks none.
        for tls in ["tls-creds", "tls-hostname", "tls-authz"] {
            if let Some(set) = parameters.get_mut(tls) {
                *set = json!("");
            }
        }
        Ok(Self { capabilities, parameters })
    }

    /// The rate that QEMU's test is held against where somebody set one, bytes per second.
    pub(super) fn switchover_bandwidth(&self) -> Option<u64> {
        self.parameters.get("avail-switchover-bandwidth").and_then(Value::as_u64).filter(|rate| *rate > 0)
    }

    /// Makes these the present ones: whatever differs from `now` is set.
    pub(super) async fn apply(&self, monitor: &mut Monitor, now: &Self) -> Result<(), QmpError> {
        let changed = |(name, on): &(&String, &bool)| now.capabilities.get(*name) != Some(*on);
        let capabilities: Vec<(&str, bool)> =
            self.capabilities.iter().filter(changed).map(|(name, on)| (name.as_str(), *on)).collect();
        let parameters: Map<_, _> = self
            .parameters
            .iter()
            .filter(|(name, value)| now.parameters.get(*name) != Some(value))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        if !capabilities.is_empty() {
            // One command: QEMU checks what comes of them all.
            migration::set_capabilities(monitor, &capabilities).await?;
        }
        if !parameters.is_empty() {
            migration::set_parameters(monitor, parameters).await?;
        }
        Ok(())
    }

    /// Is it certain that QEMU could not complete a migration under these?
    pub(super) fn cannot_complete(&self) -> bool {
        NEVER_WITHOUT.iter().all(|name| self.capabilities.get(*name) == Some(&true))
    }

    /// What differs from `other`, by name, each with the value here: empty where they are equal.
    pub(super) fn differences(&self, other: &Self) -> Vec<String> {
        let capabilities = self
            .capabilities
            .iter()
            .filter(|(name, on)| other.capabilities.get(*name) != Some(on))
            .map(|(name, on)| format!("{name}={}", if *on { "on" } else { "off" }));
        let parameters = self
            .parameters
            .iter()
            .filter(|(name, value)| other.parameters.get(*name) != Some(value))
            .map(|(name, value)| format!("{name}={value}"));
        capabilities.chain(parameters).collect()
    }
}
