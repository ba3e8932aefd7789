//! QEMU's migration settings, borrowed: taken down before a dry run, put back after it, and compared.
//!
//! In: a monitor. Out: what was set, or which setting is not what it was. A run borrows the machinery that the next real migration uses:
//! a `switchover-ack` left behind would keep that one from ever ending.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{Compression, DryRunError, Plan, whole_ms};
use crate::{
    model::units::{Bandwidth, BytesPerSecond},
    qemu::{
        migration::{self, UNCAPPED},
        monitor::Monitor,
        qmp::{QmpError, plain},
    },
};

/// Capabilities that stay as they are: they say how QEMU talks, not how it migrates.
const UNTOUCHED: [&str; 1] = ["events"];
const DOWNTIME_LIMIT: &str = "downtime-limit";
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
        parameters.insert(DOWNTIME_LIMIT.to_owned(), json!(whole_ms(plan.longest_limit())));
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

    /// Nothing?
    pub(super) fn is_empty(&self) -> bool {
        self.capabilities.is_empty() && self.parameters.is_empty()
    }
}

/// What was borrowed, and what was there before.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Loan {
    pub(super) before: Settings,
    pub(super) during: Settings,
    /// To each of these the run may have lowered QEMU's limit, ms.
    limits_ms: Vec<u64>,
}

impl Loan {
    /// What this plan borrows of these settings.
    pub(super) fn of(before: Settings, plan: &Plan) -> Result<Self, DryRunError> {
        let during = before.of(plan)?;
        Ok(Self { before, during, limits_ms: plan.downtime_limits.iter().copied().map(whole_ms).collect() })
    }

    /// What of it is still so `now`, with the values that were there before. What somebody else has changed since is theirs.
    pub(super) fn outstanding(&self, now: &Settings) -> Settings {
        let mut during = self.during.clone();
        if let Some(limit) =
            now.parameters.get(DOWNTIME_LIMIT).filter(|ms| ms.as_u64().is_some_and(|ms| self.limits_ms.contains(&ms)))
        {
            during.parameters.insert(DOWNTIME_LIMIT.to_owned(), limit.clone());
        }
        Settings {
            capabilities: still(&during.capabilities, &self.before.capabilities, &now.capabilities),
            parameters: still(&during.parameters, &self.before.parameters, &now.parameters).into_iter().collect(),
        }
    }

    /// Puts it back. Out: what could not be.
    pub(super) async fn repay(&self, monitor: &mut Monitor) -> Result<Settings, QmpError> {
        let now = Settings::read(monitor).await?;
        self.outstanding(&now).apply(monitor, &now).await?;
        Ok(self.outstanding(&Settings::read(monitor).await?))
    }
}

impl fmt::Display for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let capabilities = self.capabilities.iter().map(|(name, on)| format!("{name}={}", if *on { "on" } else { "off" }));
        let parameters = self.parameters.iter().map(|(name, value)| format!("{name}={value}"));
        f.write_str(&plain(&capabilities.chain(parameters).collect::<Vec<_>>().join(", ")))
    }
}

/// Entries of `during` that are so now and were different before, with the value of before.
fn still<'a, V: PartialEq + Clone + 'a>(
    during: impl IntoIterator<Item = (&'a String, &'a V)>,
    before: &impl Lookup<V>,
    now: &impl Lookup<V>,
) -> BTreeMap<String, V> {
    during
        .into_iter()
        .filter(|(name, value)| now.value(name) == Some(value))
        .filter_map(|(name, value)| {
            before.value(name).filter(|before| *before != value).map(|before| (name.clone(), before.clone()))
        })
        .collect()
}

/// What both kinds of maps can do.
trait Lookup<V> {
    fn value(&self, name: &str) -> Option<&V>;
}

impl<V> Lookup<V> for BTreeMap<String, V> {
    fn value(&self, name: &str) -> Option<&V> {
        self.get(name)
    }
}

impl Lookup<Value> for Map<String, Value> {
    fn value(&self, name: &str) -> Option<&Value> {
        self.get(name)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::time::Duration;

    use super::*;

    fn settings(capabilities: &[(&str, bool)], parameters: &Value) -> Settings {
        let capabilities = capabilities.iter().map(|(name, on)| ((*name).to_owned(), *on)).collect();
        Settings { capabilities, parameters: parameters.as_object().unwrap().clone() }
    }

    fn ordinary() -> Settings {
        let capabilities = [
            ("auto-converge", true),
            ("events", true),
            ("multifd", false),
            ("pause-before-switchover", true),
            ("return-path", false),
            ("switchover-ack", false),
            ("xbzrle", false),
        ];
        settings(
            &capabilities,
            &json!({"downtime-limit": 300, "max-bandwidth": 134_217_728, "multifd-channels": 2, "tls-creds": "tls0"}),
        )
    }

    #[test]
    fn a_run_sets_what_it_needs_and_switches_the_rest_off() {
        let plan = Plan::new(Bandwidth::Capped(BytesPerSecond(1 << 20)));
        let during = ordinary().of(&plan).unwrap();
        assert!(during.cannot_complete() && !ordinary().cannot_complete());
        let on: Vec<_> = during.capabilities.iter().filter(|(_, on)| **on).map(|(name, _)| name.as_str()).collect();
        assert_eq!(on, ["events", "return-path", "switchover-ack"]);
        assert_eq!(during.parameters["max-bandwidth"], 1 << 20);
        assert_eq!(during.parameters["tls-creds"], "");
        // Multifd does not honour the cap.
        let during = ordinary().of(&Plan { channels: 8, ..plan.clone() }).unwrap();
        assert_eq!(
            (during.parameters["multifd-channels"].clone(), during.parameters["max-bandwidth"].clone()),
            (json!(8), json!(UNCAPPED))
        );
        // An old QEMU.
        let mut old = ordinary();
        old.capabilities.remove("switchover-ack");
        assert!(matches!(old.of(&plan), Err(DryRunError::Lacks { capability }) if capability == "switchover-ack"));
    }

    #[test]
    fn what_somebody_else_has_changed_is_theirs() {
        let limits = vec![Duration::from_secs(1), Duration::from_millis(50)];
        let plan = Plan { downtime_limits: limits, ..Plan::new(Bandwidth::Capped(BytesPerSecond(1 << 20))) };
        let loan = Loan::of(ordinary(), &plan).unwrap();
        let mut now = loan.during.clone();
        now.parameters["max-bandwidth"] = json!(7);
        now.parameters["downtime-limit"] = json!(50);
        now.capabilities.insert("switchover-ack".to_owned(), false);
        let back = loan.outstanding(&now);
        let shown = "auto-converge=on, pause-before-switchover=on, return-path=off, downtime-limit=300, tls-creds=\"tls0\"";
        assert_eq!(back.to_string(), shown);
        assert!(loan.outstanding(&loan.before).is_empty());
    }
}
